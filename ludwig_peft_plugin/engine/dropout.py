"""Dropout whose mask is drawn again from its seed instead of being kept for the backward pass.

The seed lies on the device and stays the same within a micro-batch, so the backward pass, a recomputed forward pass
and a replayed CUDA graph all find the mask of the first forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

_seeds: dict[torch.device, Tensor] = {}


def draw_seed(device: torch.device) -> None:
    """Take a new seed for `device` from the host's random generator, for the next micro-batch."""
    seed_of(device).fill_(int(torch.randint(2**31 - 2**20, ())))


def seed_of(device: torch.device) -> Tensor:
    """Return the current seed of `device`, shape (1,), int64, always in the same place."""
    if device not in _seeds:
        _seeds[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _seeds[device]


def dropout(x: Tensor, p: float, stream: int) -> Tensor:
    """Return x with a share `p` of its elements zero and the others divided by 1 - p.

    Args:
        x: contiguous.
        p: share of the elements.
        stream: a number that tells this mask from the others of the same seed.
    """
    if not p:
        return x
    if x.is_cuda:
        from ludwig_peft_plugin.engine.kernels.dropout import dropout as kernel

        return kernel(x, p, seed_of(x.device), stream)
    generator = torch.Generator().manual_seed(int(seed_of(x.device)) + stream)
    kept = torch.rand(x.shape, generator=generator) >= p
    return torch.where(kept, x / (1 - p), 0.0).to(x.dtype)
