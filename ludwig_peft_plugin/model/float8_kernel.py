"""Rounding of rows to float8, one program a row, which it reads once (see float8_arithmetic.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ludwig_peft_plugin.model.float8_arithmetic import FLOAT8, LARGEST, SMALLEST_MAXIMUM

BLOCK = 16384
"""Numbers of a row that a program holds in registers; the rest of a longer row is read a second time."""


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x,
    stride,
    column_scale,
    x8,
    scales,
    columns,
    LARGEST: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    x8 += row * columns
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    first = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        first = first * tl.load(column_scale + offsets, mask=inside, other=0.0)
    largest = tl.max(tl.abs(first), axis=0)
    for part in tl.static_range(1, PARTS):
        place = offsets + part * BLOCK
        more = place < columns
        values = tl.load(x + place, mask=more, other=0.0).to(tl.float32)
        if SCALED:
            values = values * tl.load(column_scale + place, mask=more, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=0))
    largest = tl.maximum(largest, SMALLEST_MAXIMUM)
    factor = tl.div_rn(LARGEST, largest)  # as PyTorch divides; the default is off by a bit now and then
    tl.store(scales + row, largest * (1.0 / LARGEST))
    tl.store(x8 + offsets, (first * factor).to(x8.dtype.element_ty), mask=inside)
    for part in tl.static_range(1, PARTS):
        place = offsets + part * BLOCK
        more = place < columns
        values = tl.load(x + place, mask=more, other=0.0).to(tl.float32)
        if SCALED:
            values = values * tl.load(column_scale + place, mask=more, other=0.0)
        tl.store(x8 + place, (values * factor).to(x8.dtype.element_ty), mask=more)


def quantize_rows(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return float8 rows and their scales; arguments and results as in `float8_arithmetic.quantize_rows`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    x8 = torch.empty((rows, columns), dtype=FLOAT8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        _quantize_rows[(rows,)](
            x,
            x.stride(0),
            x if column_scale is None else column_scale,
            x8,
            scales,
            columns,
            LARGEST,
            SMALLEST_MAXIMUM,
            column_scale is not None,
            triton.cdiv(columns, block),
            block,
            num_warps=max(4, min(16, block // 512)),
        )
    return x8, scales
