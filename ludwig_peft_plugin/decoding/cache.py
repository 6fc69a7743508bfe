"""The key-value cache of generation: one slot a row, filled from its start, whatever the other rows' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Places:
    """Where the next forward pass writes keys and values, shared by all layers.

    Attributes:
        slots: the slot of each written token: of all tokens of a flat row of prompts, or of one new token a slot.
        columns: the place in the slot of each written token, the same shape.
        length: how many places of the slots the new tokens look at; None while prompts are read.
    """

    slots: Tensor
    columns: Tensor
    length: int | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each (slots, kv_heads, capacity, d)."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values; return what its queries look at.

        Prompts, (1, kv_heads, T, d), look at themselves. New tokens, (slots, kv_heads, 1, d), look at their slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self._cache.places
        if places.length is None:
            self.keys[places.slots, :, places.columns] = key_states[0].transpose(0, 1)
            self.values[places.slots, :, places.columns] = value_states[0].transpose(0, 1)
            return key_states, value_states
        self.keys[places.slots, :, places.columns] = key_states[:, :, 0]
        self.values[places.slots, :, places.columns] = value_states[:, :, 0]
        return self.keys[:, :, : places.length], self.values[:, :, : places.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots once heads, sizes, dtype and device are known.

        They start as zeros: what is masked still meets a zero weight, and zero times not-a-number is not zero.
        """
        shape = (self._cache.slots, key_states.shape[1], self._cache.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def resize(self, kept: Tensor, slots: int, capacity: int) -> None:
        """Move the slots `kept` to the front of `slots` slots with `capacity` places each."""
        if self.is_initialized:
            self.keys = _moved(self.keys, kept, slots, capacity)
            self.values = _moved(self.values, kept, slots, capacity)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys."""
        return self._cache.places.length or query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: rows have lengths of their own, and every pass states its positions."""
        return 0

    def get_max_length(self) -> int:
        """Return how many places a slot has."""
        return self._cache.capacity


class SlotCache(Cache):
    """A transformers cache whose rows begin and end independently of each other.

    Attributes:
        slots: how many rows there is room for.
        capacity: how many tokens each of them can have.
        places: where the next forward pass writes; set before each pass.
    """

    places: Places

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def resize(self, kept: Tensor, slots: int, capacity: int) -> None:
        """Keep the slots `kept`, (k,), as the first of `slots` slots with `capacity` places; the rest is forgotten."""
        self.slots, self.capacity = slots, capacity
        for layer in self.layers:
            layer.resize(kept, slots, capacity)


def _moved(tensor: Tensor, kept: Tensor, slots: int, capacity: int) -> Tensor:
    _, heads, old, size = tensor.shape
    length = min(old, capacity)
    moved = tensor.new_zeros((slots, heads, capacity, size))
    moved[: len(kept), :, :length] = tensor[kept, :, :length]
    return moved
