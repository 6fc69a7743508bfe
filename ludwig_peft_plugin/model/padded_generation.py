"""Generation by transformers' own `generate`, in batches padded on the left: every search and every model it knows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.model_input import VirtualTokens
from ludwig_peft_plugin.engine.virtual_tokens import virtual_tokens

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 16
PROBABILITY_BYTES = 2**29  # of the logits from which the probabilities of some rows are read at once

# Settings that look at the prompt's tokens, of which padding would be some, with the value that switches them off.
LOOK_BACK = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0}

Made = tuple[np.ndarray, np.ndarray]


def generate_padded(
    model: Any,
    prompts: Sequence[np.ndarray],
    config: Any,
    *,
    device: torch.device,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    streamer: Any = None,
    adapter_names: Sequence[str] | None = None,
    tasks: np.ndarray | None = None,
) -> list[Made]:
    """Return tokens and probabilities of an answer to each prompt, in the order of `prompts`.

    Prompts of similar length go together, the longest first, padded on the left with an attention mask, from which
    transformers derives the positions. Each batch's result is moved off the device before the next one starts.

    Args:
        model: the transformers model, with or without PEFT around it.
        prompts: token ids, at least one each.
        config: transformers' generation settings.
        device: where the model is.
        batch_size: prompts in a batch at most.
        progress: called with the number of prompts of each batch.
        streamer: gets the tokens of a single prompt as they are made.
        adapter_names: the adapter of each prompt, where PEFT can mix them in a batch; None is the active one.
        tasks: the number of each prompt's task, shape (n,), for adapters with tasks.
    """
    made: dict[int, Made] = {}
    if getattr(config, "prompt_lookup_num_tokens", None):
        batch_size = 1  # transformers does not look up in more than one prompt
    batches = deque(
        _batches([len(prompt) for prompt in prompts], batch_size or DEFAULT_BATCH, _needs_one_length(model, config))
    )
    while batches:
        rows = batches.popleft()
        try:
            names = None if adapter_names is None else [adapter_names[row] for row in rows]
            task_ids = None if tasks is None else torch.as_tensor(tasks[rows]).long().to(device)
            virtual = virtual_tokens(model, task_ids)
            given = [prompts[row] for row in rows]
            if virtual is None:
                answers = _generate(model, given, config, device, streamer, names)
            else:
                answers = _generate_after(virtual, unwrapped(model), given, config, device, streamer)
            made |= zip(rows, answers, strict=True)
        except torch.OutOfMemoryError:
            half = len(rows) // 2
            if not half:
                raise
            logger.warning("Memory ran out with %d answers at once; trying half of them.", len(rows))
            batches.extendleft((rows[half:], rows[:half]))
            continue
        if progress is not None:
            progress(len(rows))
    return [made[row] for row in range(len(prompts))]


def _needs_one_length(model: Any, config: Any) -> bool:
    """Return whether padding would change answers: settings look back at it, or it is between a prefix and its text.

    A prefix is the beginning of the cache, so padding on the left comes after it. Only a sliding window counts it.
    """
    adapter = getattr(model, "active_peft_config", None)
    windowed = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    if windowed and adapter is not None and adapter.is_prompt_learning:
        return True
    return any(getattr(config, name, None) not in (None, neutral) for name, neutral in LOOK_BACK.items())


def _batches(lengths: list[int], batch_size: int, one_length: bool) -> Iterator[list[int]]:
    """Yield the prompts, by number, that go together: of similar length, or of one length alone."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) == batch_size or (one_length and lengths[row] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _generate(
    model: Any,
    prompts: list[np.ndarray],
    config: Any,
    device: torch.device,
    streamer: Any = None,
    adapter_names: list[str] | None = None,
) -> list[Made]:
    input_ids, mask = _left_padded(prompts, config, device)
    width = input_ids.shape[1]
    mixed: dict[str, Any] = {}
    if adapter_names is not None:
        mixed["adapter_names"] = adapter_names
        if (config.num_beams or 1) > 1:  # PEFT repeats the names for each beam, and reads their number here alone
            mixed["num_beams"] = config.num_beams
    sequences = model.generate(
        input_ids=input_ids, attention_mask=mask, generation_config=config, streamer=streamer, **mixed
    )
    after_end, kept = _ends(sequences[:, width:], config)
    read = torch.cat([mask, (~after_end).long()], dim=1)
    # Stated only where padding shifts them.
    shifted = not bool(read[:, 0].all())

    def run(part: slice, **options: Any) -> Tensor:
        given: dict[str, Any] = {"input_ids": sequences[part], "attention_mask": read[part]}
        if shifted:
            given["position_ids"] = (read[part].cumsum(dim=1) - 1).clamp(min=0)
        if adapter_names is not None:
            given["adapter_names"] = adapter_names[part]
        logits: Tensor = model(**given, **options).logits
        return logits

    return _made(sequences[:, width:], _token_probabilities(run, model, sequences, width), kept)


@torch.no_grad()
def _generate_after(
    virtual: VirtualTokens, base: Any, prompts: list[np.ndarray], config: Any, device: torch.device, streamer: Any
) -> list[Made]:
    """Return what a model with virtual tokens generates, by transformers' `generate` of the base itself.

    PEFT's own takes a cache and a mask of other shapes than transformers now makes.
    """
    input_ids, mask = _left_padded(prompts, config, device)
    width = input_ids.shape[1]
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    given = virtual.for_generation(base, input_ids, mask, copies)
    sequences = base.generate(**given, generation_config=config, streamer=streamer)[:, virtual.count :]
    after_end, kept = _ends(sequences[:, width:], config)
    read = torch.cat([mask, (~after_end).long()], dim=1)

    def run(part: slice, **options: Any) -> Tensor:
        given = virtual.of_rows(part).after_padding(base, sequences[part], read[part])
        logits: Tensor = base(**given, **options).logits
        return logits

    return _made(sequences[:, width:], _token_probabilities(run, base, sequences, width), kept)


def _left_padded(prompts: list[np.ndarray], config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as rows padded on the left, and their mask, each (B, L)."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)


def _ends(answers: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return what lies behind the end of each answer, and what belongs to it: its end-of-sequence token does not."""
    is_end = torch.isin(answers, torch.tensor(config.eos_token_id, device=answers.device))
    after_end = is_end.cumsum(dim=1) - is_end.long() > 0
    return after_end, ~after_end & ~is_end


def _made(answers: Tensor, probabilities: Tensor, kept: Tensor) -> list[Made]:
    return [
        (tokens[keep].numpy(), chances[keep].numpy())
        for tokens, chances, keep in zip(answers.cpu(), probabilities.cpu(), kept.cpu(), strict=True)
    ]


def _token_probabilities(run: Callable[..., Tensor], model: Any, sequences: Tensor, width: int) -> Tensor:
    """Return the model's probability of each generated token, shape (B, new tokens), by one more forward pass.

    The scores of a search are changed by penalties and belong to beams, so they are not the model's probabilities.

    Args:
        run: gives the logits of a slice of the rows, with the model's options `use_cache` and `logits_to_keep`.
        model: whose vocabulary it is.
        sequences: prompts and answers, shape (B, width + new tokens).
        width: where answers begin.
    """
    new_tokens = sequences.shape[1] - width
    if new_tokens == 0:
        return torch.zeros((len(sequences), 0), device=sequences.device)
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, PROBABILITY_BYTES // (4 * vocabulary * (new_tokens + 1)))
    parts = []
    for start in range(0, len(sequences), rows):
        part = slice(start, start + rows)
        logits = run(part, use_cache=False, logits_to_keep=new_tokens + 1)[:, -new_tokens - 1 : -1]
        chosen = logits.float().log_softmax(dim=-1).gather(2, sequences[part, width:, None])
        parts.append(chosen.squeeze(2).exp())
    return torch.cat(parts)
