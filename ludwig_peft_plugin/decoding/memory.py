"""How much goes through a model at once without gradients: as much as the free memory has room for."""

from __future__ import annotations

from typing import Any

import torch

MOST_TOKENS = {"cuda": 8_192, "cpu": 2_048}
"""Tokens of one forward pass over whole rows. More of them keep no device busier."""

LEAST_TOKENS = 1_024

MOST_SLOTS = {"cuda": 512, "cpu": 128}
"""More rows at once make a step longer in the same measure, so that nothing is won."""

USED_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""How much of the free memory may be used; a CPU's is not this process's own."""


def pass_tokens(base: Any, device: torch.device) -> int:
    """Return how many tokens to put through the transformers model `base` in one forward pass without gradients."""
    room = int(_share(device) * free_memory(device) / 2 / _bytes_of_pass(base))
    return min(_of(MOST_TOKENS, device), max(LEAST_TOKENS, room))


class SlotBudget:
    """Memory that slots may take, measured once, with what a slot costs.

    Attributes:
        bytes: what all slots together may take.
    """

    def __init__(self, base: Any, device: torch.device) -> None:
        config = base.config.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = base.dtype.itemsize
        self._most = _of(MOST_SLOTS, device)
        self._token = 2 * config.num_hidden_layers * key_heads * size * width
        # Logits in the model's dtype, a few times in float32 and, when sampling, in float64.
        self._logits = config.vocab_size * (width + 3 * 4 + 3 * 8)
        reading = pass_tokens(base, device) * _bytes_of_pass(base)
        self.bytes = max(0, int(_share(device) * free_memory(device)) - reading)

    def slots(self, capacity: int) -> int:
        """Return how many slots of `capacity` tokens there is room for, at least one."""
        return max(1, min(self._most, self.bytes // (capacity * self._token + self._logits)))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device`, what PyTorch keeps for reuse included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _bytes_of_pass(base: Any) -> int:
    """Return what a token takes in a forward pass: a layer's MLP and a few tensors of the hidden size."""
    config = base.config.get_text_config()
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * config.hidden_size
    return int((3 * inner + 8 * config.hidden_size) * base.dtype.itemsize)


def _share(device: torch.device) -> float:
    return USED_SHARE.get(device.type, USED_SHARE["cpu"])


def _of(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])
