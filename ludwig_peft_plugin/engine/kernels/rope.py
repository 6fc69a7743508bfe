"""Rotary position embedding of rows of heads (see elementwise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    result,
    result_stride,
    cos,
    sin,
    direction,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < HEADS * HALF
    within = places % HALF
    left = (places // HALF) * (2 * HALF) + within
    first = tl.load(x + row * x_stride + left, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + left + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * 2 * HALF + within, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + row * 2 * HALF + within, mask=inside, other=0.0).to(tl.float32) * direction
    result += row * result_stride + left
    tl.store(result, (first * c - second * s).to(result.dtype.element_ty), mask=inside)
    tl.store(result + HALF, (second * c + first * s).to(result.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Return the rotated heads, shape (T, heads, d), contiguous."""
    tokens, heads, size = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(heads * size // 2))
    grid = (tokens, triton.cdiv(heads * size // 2, block))
    direction = -1.0 if inverse else 1.0
    _rotate[grid](x, x.stride(0), result, heads * size, cos, sin, direction, heads, size // 2, block, num_warps=4)
    return result
