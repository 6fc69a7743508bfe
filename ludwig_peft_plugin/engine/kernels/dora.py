"""DoRA's column scales, forward and backward, in one pass each (see elementwise.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ludwig_peft_plugin.engine.kernels.low_rank import VARYING, arguments, rank_block, tile_plus

ROWS, COLUMNS, WARPS = 64, 128, 8
ROWS_OF_A_SUM = 512


@triton.jit(do_not_specialize=VARYING)
def _dora_scale_(  # type: ignore[no-untyped-def]
    y, left, ls, right, rr, rc, scale, bias, row_count,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tile_plus(y, left, ls, right, rr, rc, rows, columns, row_count, WIDTH, RANK, RANK_BLOCK)
    values *= tl.load(scale + columns, mask=columns < WIDTH, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < WIDTH)
    tl.store(y + rows[:, None].to(tl.int64) * WIDTH + columns[None, :], values.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _dora_gradient(  # type: ignore[no-untyped-def]
    grad, y, scale, bias, scaled, sums, row_count,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c_inside = columns < WIDTH
    scales = tl.load(scale + columns, mask=c_inside, other=0.0)
    shift = tl.zeros((COLUMNS,), dtype=tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=c_inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, SPAN, ROWS):
        rows = tl.program_id(0) * SPAN + start + tl.arange(0, ROWS)
        inside = (rows[:, None] < row_count) & c_inside[None, :]
        place = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
        grads = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grads * (values - shift[None, :]), axis=0)
        tl.store(scaled + place, (grads * scales[None, :]).to(scaled.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * WIDTH + columns, total, mask=c_inside)


def scale_columns_(y: Tensor, plus: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return scale * (y + left right^T) + bias, in the memory of y."""
    args, rank = arguments(plus, y)
    rows, width = y.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    sizes = (width, rank, rank_block(rank), bias is not None, ROWS, COLUMNS)
    _dora_scale_[grid](y, *args, scale, y if bias is None else bias, rows, *sizes, num_warps=WARPS)
    return y


def scaled_gradient(grad: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return grad * scale and the column sums of grad * (y - bias), float32."""
    rows, width = y.shape
    grid = (triton.cdiv(rows, ROWS_OF_A_SUM), triton.cdiv(width, COLUMNS))
    scaled = torch.empty_like(grad)
    sums = torch.empty((grid[0], width), dtype=torch.float32, device=y.device)
    sizes = (width, bias is not None, ROWS_OF_A_SUM, ROWS, COLUMNS)
    _dora_gradient[grid](grad, y, scale, y if bias is None else bias, scaled, sums, rows, *sizes, num_warps=WARPS)
    return scaled, sums.sum(dim=0)
