"""Keys and values that stand before every sequence (prefix tuning), as transformers' caches that are only read.

A layer asks a cache to add its new keys and values and attends over what comes back. These add nothing to themselves,
so a layer that gradient checkpointing runs a second time gets the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

KeysAndValues = tuple[Tensor, Tensor]
"""Of one layer and one sequence, each of shape (kv_heads, P, d)."""


class _PaddedLayer(DynamicLayer):
    """Puts the prefix before every row of a batch."""

    def __init__(self, prefix: KeysAndValues, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(*prefix)
        self.keys, self.values = (tensor.expand(rows, *tensor.shape) for tensor in prefix)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return prefix and new states, (rows, kv_heads, P + L, d); nothing is kept."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _FlatLayer(DynamicLayer):
    """Puts the prefix before every sequence of a flat row."""

    def __init__(self, prefix: KeysAndValues, places: Tensor, prefix_places: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(*prefix)
        self.keys, self.values = (tensor[None] for tensor in prefix)
        self._places, self._prefix_places = places, prefix_places

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the flat row with prefixes in it, (1, kv_heads, T + S P, d); nothing is kept."""
        return self._laid_out(self.keys, key_states), self._laid_out(self.values, value_states)

    def _laid_out(self, prefix: Tensor, states: Tensor) -> Tensor:
        sequences = len(self._prefix_places) // prefix.shape[2]
        rows = states.new_empty(1, states.shape[1], states.shape[2] + len(self._prefix_places), states.shape[3])
        repeated = prefix.to(states.dtype).repeat(1, 1, sequences, 1)
        return rows.index_copy(2, self._prefix_places, repeated).index_copy(2, self._places, states)


def padded_cache(prefix: Sequence[KeysAndValues], rows: int) -> Cache:
    """Return a cache for `rows` rows of equal length, padded on the right; `prefix` has an entry for each layer."""
    return Cache(layers=[_PaddedLayer(layer, rows) for layer in prefix])


def flat_cache(prefix: Sequence[KeysAndValues], places: Tensor, prefix_places: Tensor) -> Cache:
    """Return a cache for sequences in one flat row.

    Args:
        prefix: an entry for each layer.
        places: where each token lies once there is a prefix before every sequence, shape (T,).
        prefix_places: where the prefixes lie, sequence by sequence, shape (S P,).
    """
    return Cache(layers=[_FlatLayer(layer, places, prefix_places) for layer in prefix])


def growing_cache(prefix: Sequence[KeysAndValues], rows: int) -> DynamicCache:
    """Return an ordinary cache that holds the prefix for `rows` rows, for transformers' `generate` to add to."""
    repeated = [tuple(tensor.expand(rows, *tensor.shape).clone() for tensor in layer) for layer in prefix]
    return DynamicCache(repeated)
