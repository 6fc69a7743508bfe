"""Generation by transformers' own `generate`, in batches padded on the left: every search and every model it knows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
            made |= zip(rows, _generate(model, [prompts[row] for row in rows], config, device, streamer), strict=True)
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
    """Return whether padding would change answers: settings look back at it, or soft prompts shift positions by it."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
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
    model: Any, prompts: list[np.ndarray], config: Any, device: torch.device, streamer: Any = None
) -> list[Made]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    sequences = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, streamer=streamer)
    answers = sequences[:, width:]

    # The end-of-sequence token is no part of the answer.
    is_end = torch.isin(answers, torch.tensor(config.eos_token_id, device=device))
    after_end = is_end.cumsum(dim=1) - is_end.long() > 0
    probabilities = _token_probabilities(model, sequences, torch.cat([mask, (~after_end).long()], dim=1), width)
    kept = ~after_end & ~is_end
    return [
        (tokens[keep].numpy(), chances[keep].numpy())
        for tokens, chances, keep in zip(answers.cpu(), probabilities.cpu(), kept.cpu(), strict=True)
    ]


def _token_probabilities(model: Any, sequences: Tensor, mask: Tensor, width: int) -> Tensor:
    """Return the model's probability of each generated token, shape (B, new tokens), by one more forward pass.

    The scores of a search are changed by penalties and belong to beams, so they are not the model's probabilities.
    """
    new_tokens = sequences.shape[1] - width
    if new_tokens == 0:
        return torch.zeros((len(sequences), 0), device=sequences.device)
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, PROBABILITY_BYTES // (4 * vocabulary * (new_tokens + 1)))
    # Stated only where padding shifts them: models with soft prompts count their own.
    places: dict[str, Tensor] = {}
    if not bool(mask[:, 0].all()):
        places["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    parts = []
    for start in range(0, len(sequences), rows):
        part = slice(start, start + rows)
        logits = model(
            input_ids=sequences[part],
            attention_mask=mask[part],
            use_cache=False,
            logits_to_keep=new_tokens + 1,
            **{name: tensor[part] for name, tensor in places.items()},
        ).logits[:, -new_tokens - 1 : -1]
        chosen = logits.float().log_softmax(dim=-1).gather(2, sequences[part, width:, None])
        parts.append(chosen.squeeze(2).exp())
    return torch.cat(parts)
