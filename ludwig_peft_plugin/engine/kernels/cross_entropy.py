"""Cross-entropy of rows of logits with its gradient, in two passes over the logits (see elementwise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    stride,
    targets,
    losses,
    hits,
    gradient_scale,
    COLUMNS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    target_logit = tl.load(logits + target).to(tl.float32)

    largest = -float("inf")
    total = 0.0
    best = target * 0
    for start in range(0, COLUMNS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(logits + offsets, mask=offsets < COLUMNS, other=-float("inf")).to(tl.float32)
        block_largest = tl.max(values, axis=0)
        best = tl.where(block_largest > largest, tl.argmax(values, axis=0) + start, best)
        new_largest = tl.maximum(largest, block_largest)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(values - new_largest), axis=0)
        largest = new_largest

    tl.store(losses + row, largest + tl.log(total) - target_logit)
    tl.store(hits + row, (best == target).to(tl.int8))
    if WITH_GRADIENT:
        factor = gradient_scale / total
        for start in range(0, COLUMNS, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < COLUMNS
            values = tl.load(logits + offsets, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(values - largest) * factor
            gradient = tl.where(offsets == target, gradient - gradient_scale, gradient)
            tl.store(logits + offsets, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits: Tensor, targets: Tensor, with_gradient: bool, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """Return losses and hits; the gradient replaces the logits."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    hits = torch.empty(len(logits), dtype=torch.int8, device=logits.device)
    if len(logits):
        columns = logits.shape[1]
        block = min(BLOCK, triton.next_power_of_2(columns))
        _cross_entropy[(len(logits),)](
            logits, logits.stride(0), targets, losses, hits, gradient_scale, columns, with_gradient, block, num_warps=16
        )
    return losses, hits.bool()
