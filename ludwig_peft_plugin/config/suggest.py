"""Did-you-mean hints for names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 8
CUTOFF = 0.6  # difflib's ratio of shared letters; 0.66 is one letter too many after one

# What other fine-tuning tools call the options of this one.
SYNONYMS = {
    "bias": "bias_type",
    "gradient_checkpointing": "enable_gradient_checkpointing",
    "load_in_4bit": "bits",
    "load_in_8bit": "bits",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "lr": "learning_rate",
    "lr_scheduler_type": "decay",
    "max_grad_norm": "clipglobalnorm",
    "max_length": "global_max_sequence_length",
    "max_seq_length": "global_max_sequence_length",
    "max_steps": "train_steps",
    "model": "base_model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch_size",
    "quantization_type": "bnb_4bit_quant_type",
    "rank": "r",
    "warmup_ratio": "warmup_fraction",
}


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` was most likely meant to be, None when none is near."""
    normal = _normal(word)
    by_letters = {_normal(name): name for name in candidates}
    synonym = SYNONYMS.get(normal)
    if synonym in by_letters:
        return by_letters[synonym]
    near = difflib.get_close_matches(normal, by_letters, n=1, cutoff=CUTOFF)
    return by_letters[near[0]] if near else None


def renamed(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that other tools call `word`, None when there is none."""
    synonym = SYNONYMS.get(_normal(word))
    return synonym if synonym in set(candidates) else None


def hint(word: str, candidates: Iterable[str]) -> str:
    """Return `did you mean ...?`, or the names there are when none is near."""
    names = [str(name) for name in candidates]
    near = closest(word, names)
    return f"did you mean `{near}`?" if near else f"known here: {listing(names)}"


def listing(names: Iterable[str]) -> str:
    """Return names as a short comma-separated list."""
    known = sorted(names)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ", ".join(f"`{name}`" for name in known[:LISTED]) + more


def _normal(word: str) -> str:
    return str(word).lower().replace("-", "_")
