"""Root mean square normalisation, forward and backward, one program a row (see elementwise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, weight, y, scales, eps, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    tl.store(scales + row, scale)
    normed = (values * scale).to(y.dtype.element_ty).to(tl.float32)  # rounded here too, as transformers does
    weights = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + offsets, (normed * weights).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    x, weight, grad, second, third, residual, result, eps, columns, GRADS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    place = row * columns + offsets
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    normed = values * scale
    weights = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if GRADS > 1:
        grads += tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if GRADS > 2:
        grads += tl.load(third + place, mask=inside, other=0.0).to(tl.float32)
    scaled = grads * weights
    gradient = scale * (scaled - normed * (tl.sum(scaled * normed, axis=0) / columns))
    gradient += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, gradient.to(result.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows, and what each was multiplied by."""
    y, scales = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    block, warps = _settings(x.shape[1])
    _rms_norm[(len(x),)](x, weight, y, scales, eps, x.shape[1], block, num_warps=warps)
    return y, scales


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grads: list[Tensor], residual: Tensor) -> Tensor:
    """Return the gradient of x, plus `residual`; that of the normalised rows is the sum of one to three `grads`."""
    result = torch.empty_like(x)
    block, warps = _settings(x.shape[1])
    three = [*grads, *[grads[0]] * (3 - len(grads))]
    _rms_norm_backward[(len(x),)](
        x, weight, *three, residual, result, eps, x.shape[1], len(grads), block, num_warps=warps
    )
    return result


def _settings(columns: int) -> tuple[int, int]:
    block = triton.next_power_of_2(columns)
    return block, max(4, min(16, block // 512))
