"""Generate answers for many prompts at once: the same answers as one prompt at a time."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ludwig_peft_plugin.decoding.choice import Choice
from ludwig_peft_plugin.decoding.decoder import Decoder
from ludwig_peft_plugin.decoding.rows import Row
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.transformers_attention import supports_padding_free
from ludwig_peft_plugin.model.padded_generation import generate_padded

logger = logging.getLogger(__name__)

# Settings that only mean something when tokens are sampled; transformers warns about them in a greedy search.
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_p")

# transformers' processors that look at the scores of one step alone, by the names of their classes.
LOOK_AT_SCORES = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    }
)
STOP_BY_LENGTH_OR_END = frozenset({"MaxLengthCriteria", "EosTokenCriteria"})


@dataclass(frozen=True)
class Answer:
    """One generated answer: its token ids (n,) without end-of-sequence and padding, and each token's probability."""

    tokens: np.ndarray
    probabilities: np.ndarray


def generation_settings(settings: dict[str, Any], tokenizer: Any, model: Any) -> Any:
    """Return the transformers GenerationConfig of a Ludwig `generation` section.

    End-of-sequence is the tokenizer's and every one the base names itself (Llama 3 has several).
    """
    from transformers import GenerationConfig

    values = {name: value for name, value in settings.items() if value is not None}
    if not values.get("do_sample"):
        values = {name: value for name, value in values.items() if name not in SAMPLING_ONLY}
    # Ludwig fills both; max_new_tokens is the one that is meant.
    values.pop("max_length", None)
    own = getattr(model, "generation_config", None)
    ends = {tokenizer.eos_token_id}
    for stated in (values.get("eos_token_id"), own.eos_token_id if own is not None else None):
        ends.update([stated] if isinstance(stated, int) else stated or [])
    values["eos_token_id"] = sorted(ends)
    if values.get("pad_token_id") is None:
        values["pad_token_id"] = tokenizer.pad_token_id
    return GenerationConfig(**values)


def generate_answers(
    model: Any,
    prompts: Sequence[np.ndarray],
    config: Any,
    *,
    device: torch.device,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    streamer: Any = None,
    tasks: np.ndarray | None = None,
) -> list[Answer]:
    """Return an answer for each prompt (token ids), in the order of `prompts`.

    A greedy or sampled search with a model whose attention the engine knows runs in slots (`decoding`); beams,
    penalties that look back at the text, soft prompts and other models go through transformers' own `generate`.

    Args:
        model: the transformers model, with or without PEFT around it, in evaluation mode.
        prompts: token ids of each prompt.
        config: transformers' generation settings, from `generation_settings`.
        device: where the model is.
        batch_size: how many answers are generated at once at most; None leaves it to the free memory.
        progress: called with the number of answers that have become whole.
        streamer: transformers' streamer, which gets the tokens of a single prompt as they are made.
        tasks: the number of each prompt's task, shape (n,), for adapters with tasks.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    # An empty prompt still needs one token to continue from.
    filled = [np.asarray(p) if len(p) else np.array([config.eos_token_id[0]]) for p in prompts]
    choice = None if streamer is not None or not filled else slot_choice(model, config, device)
    if choice is None:
        how = {"batch_size": batch_size, "progress": progress, "streamer": streamer, "tasks": tasks}
        made = generate_padded(model, filled, config, device=device, **how)
        return [Answer(tokens, probabilities) for tokens, probabilities in made]
    seed = int(torch.randint(2**62, ())) if choice.sample else 0
    rows = [
        Row(index, prompt, np.random.default_rng((seed, index)) if choice.sample else None)
        for index, prompt in enumerate(filled)
    ]
    base = unwrapped(model)
    Decoder(base, choice, device, most_slots=batch_size, graphs=can_record(base, device)).run(rows, progress)
    for row in rows:
        probabilities = np.exp(np.array(row.log_probabilities, dtype=np.float32))
        answers[row.index] = Answer(np.array(row.tokens, dtype=np.int64), probabilities)
    return [answer for answer in answers if answer is not None]


def slot_choice(model: Any, config: Any, device: torch.device) -> Choice | None:
    """Return how tokens are chosen in slots, or None where model or settings need transformers' own `generate`."""
    base = unwrapped(model)
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and (
        adapter.is_prompt_learning or adapter.is_adaption_prompt or getattr(adapter, "alora_invocation_tokens", None)
    ):
        return None
    if not supports_padding_free(base) or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    if len(set(getattr(base, "hf_device_map", {"": device}).values())) > 1:
        return None
    # transformers itself is asked what the settings come to, with the base's own defaults filled in.
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    prepared = base.generate(
        token, attention_mask=torch.ones_like(token), generation_config=config, custom_generate=_prepared
    )
    settings, processors, criteria = prepared
    mode = str(settings.get_generation_mode().value)
    if mode not in ("greedy_search", "sample") or settings.max_new_tokens is None or not settings.use_cache:
        return None
    if {type(processor).__name__ for processor in processors} - LOOK_AT_SCORES:
        return None
    if {type(criterion).__name__ for criterion in criteria} - STOP_BY_LENGTH_OR_END:
        return None
    return Choice(processors, mode == "sample", frozenset(settings.eos_token_id), settings.max_new_tokens)


def _prepared(
    model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
) -> tuple[Any, Any, Any]:
    """Stand in for a decoding method of transformers': return what it would have been called with."""
    return generation_config, logits_processor, stopping_criteria


def can_record(base: Any, device: torch.device) -> bool:
    """Return whether a step of `base` can be recorded as a CUDA graph: nothing in it may ask the GPU for a value."""
    if device.type != "cuda" or not getattr(base, "_can_compile_fullgraph", False):
        return False
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    changing = {"dynamic", "longrope"}  # their frequencies depend on the longest position, which is asked for
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    eight_bit = bool(getattr(base, "is_loaded_in_8bit", False))  # looks for outliers in the activations
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return not (kinds & changing or eight_bit or experts)
