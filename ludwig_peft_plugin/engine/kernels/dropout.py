"""Dropout with a mask that a seed repeats (see engine/dropout.py), by Philox counters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _dropout(x, result, size, p, seed, stream, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    kept = tl.rand(tl.load(seed) + stream, offsets.to(tl.int32)) >= p
    tl.store(result + offsets, tl.where(kept, values / (1 - p), 0.0).to(result.dtype.element_ty), mask=inside)


def dropout(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Return the contiguous tensor x with dropout of share p."""
    result = torch.empty_like(x)
    _dropout[(triton.cdiv(x.numel(), BLOCK),)](x, result, x.numel(), p, seed, stream, BLOCK, num_warps=8)
    return result
