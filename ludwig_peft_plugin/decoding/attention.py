"""Attention while generating: prompts as one flat row, then one new token a row against the row's cached keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.engine import transformers_attention as padding_free_attention

NAME = "ludwig_slots"
"""The name under which transformers knows this attention."""


class Visible:
    """Which cached keys each row's new token sees: those up to its own place, within the layer's window.

    Attributes:
        positions: the place of each row's new token, shape (B,), int64.
        length: how many places of the cache are looked at.
    """

    def __init__(self, positions: Tensor, length: int) -> None:
        self.positions = positions
        self.length = length
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores of `dtype`, shape (B, 1, 1, length): 0 on what is seen, -inf elsewhere."""
        window = None if window is None or window >= self.length else window
        if (window, dtype) not in self._masks:
            places = torch.arange(self.length, device=self.positions.device)
            hidden = places > self.positions[:, None]
            if window is not None:
                hidden |= places <= self.positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, dtype] = mask[:, None, None]
        return self._masks[window, dtype]


def new_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with one new token a row.

    The query heads that share a key head become its rows, so that keys and values are read once and never copied.

    Args:
        query: shape (B, heads, 1, d).
        key: shape (B, kv_heads, L, d).
        value: shape (B, kv_heads, L, d).
        mask: added to the scores, shape (B, 1, 1, L).
        scale: factor of the scores.

    Returns:
        The output, shape (B, 1, heads, d).
    """
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, 1, heads, output.shape[-1])


def attention_for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    visible: Visible | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks its attention functions to; where `visible` is missing, to prompts in a flat row."""
    if visible is None:
        return padding_free_attention.attention_for_transformers(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = visible.mask(others.get("sliding_window"), query.dtype)
    return new_token_attention(query, key, value, mask, scale), None


@contextmanager
def slot_attention(base: Any) -> Iterator[None]:
    """Within the context, the transformers model `base` attends by `attention_for_transformers`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, attention_for_transformers)
        AttentionMaskInterface.register(NAME, _no_mask)
    config = base.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Stand in for transformers' mask functions: `Visible` and the sequences' boundaries say everything."""
