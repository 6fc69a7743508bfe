"""How the next token is chosen from the logits, and how likely the model itself holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Settings of one generation, as transformers prepared them.

    Attributes:
        processors: transformers' logits processors, which must not look at earlier tokens.
        sample: draw tokens by their probability instead of taking the likeliest.
        ends: the tokens that end an answer.
        max_new_tokens: how long an answer may become.
    """

    processors: Any
    sample: bool
    ends: frozenset[int]
    max_new_tokens: int


def choose(logits: Tensor, choice: Choice, uniform: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the next token of each row, (B,) int64, and its log-probability by the model itself, (B,) float32.

    A sampled token is where the cumulative distribution passes a number drawn for this row and step alone,
    \(\min\{t : F(t) > u\}\), so that a row's answer does not depend on which rows are generated beside it.

    Args:
        logits: shape (B, V).
        choice: the settings.
        uniform: numbers in [0, 1), one a row, shape (B,), float64; only read when sampling.
    """
    logits = logits.float()
    scores = logits
    if choice.processors:
        nothing = torch.empty((len(logits), 0), dtype=torch.long, device=logits.device)
        # Processors may write into what they get.
        scores = choice.processors(nothing, logits.clone())
    if choice.sample:
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Just below the total at most: rounding must not pass the last possible token.
        passed = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, passed, right=True)[:, 0]
    else:
        tokens = scores.argmax(dim=-1)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - logits.logsumexp(dim=-1)
