"""Virtual tokens as keys and values that every layer's attention sees before those of tokens (prefix tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.model_input import (
    ModelInput,
    VirtualTokens,
    flat_places,
    no_mask,
    padded_rows,
    positions,
)
from ludwig_peft_plugin.engine.prefix_cache import KeysAndValues, flat_cache, growing_cache, padded_cache
from ludwig_peft_plugin.engine.transformers_attention import flat_row


class CachedTokens(VirtualTokens):
    """Virtual tokens as keys and values of every layer.

    Args:
        prefix: an entry for each layer.
    """

    def __init__(self, prefix: list[KeysAndValues]) -> None:
        self.count = prefix[0][0].shape[1]
        self._prefix = prefix

    def flat(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return the flat row of T tokens, whose layers find T + S P keys."""
        starts, places, prefix_places = flat_places(batch, self.count)
        positions = batch.position_ids + self.count
        arguments = flat_row(batch.input_ids, positions, batch.cu_seqlens, batch.max_length, no_mask(batch))
        arguments["cu_seq_lens_k"], arguments["max_length_k"] = starts, batch.max_length + self.count
        arguments["past_key_values"] = flat_cache(self._prefix, places, prefix_places)
        return ModelInput(arguments, torch.arange(len(places), device=places.device), len(places))

    def padded(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return rows of L tokens, whose layers find P + L keys."""
        rows, places = padded_rows(batch)
        arguments = {"input_ids": rows, "past_key_values": padded_cache(self._prefix, len(rows)), "use_cache": False}
        return ModelInput(arguments, places, batch.max_length)

    def after_padding(self, base: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the rows with a mask and positions that count the prefix."""
        filled = self._ids_and_mask(input_ids, mask)[1]
        return {
            "input_ids": input_ids,
            "attention_mask": filled,
            "position_ids": positions(filled)[:, self.count :],
            "past_key_values": padded_cache(self._prefix, len(input_ids)),
        }

    def for_generation(self, base: Any, input_ids: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """Return the arguments of `generate`: it takes up where the prefix ends."""
        ids, filled = self._ids_and_mask(input_ids, mask)
        cache = growing_cache(self._prefix, copies * len(input_ids))
        return {"input_ids": ids, "attention_mask": filled, "past_key_values": cache}


@contextmanager
def readable_caches(base: Any, tokens: VirtualTokens | None) -> Iterator[None]:
    """Let checkpointed layers keep the cache they are given, which transformers takes away: these are only read.

    Some models leave the cache out in the loop over their layers, by a switch of their own, which is turned meanwhile.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = []
    loops: list[Any] = []
    if isinstance(tokens, CachedTokens) and getattr(base, "is_gradient_checkpointing", False):
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                layers.append(module)
            elif getattr(module, "gradient_checkpointing", False):
                loops.append(module)
    try:
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        for loop in loops:
            loop.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache
        for loop in loops:
            loop.gradient_checkpointing = True
