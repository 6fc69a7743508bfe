"""Tiles of a matrix plus, where there is one, those of a low-rank product: base + left right^T."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 16, 128, 4
"""Of a tile: small enough that many are in flight at once, which is what memory speed takes."""

VARYING = ["row_count", "part_rows"]
"""Arguments that change from batch to batch. Triton would compile a kernel again for numbers that 16 divides."""

SMALLEST_RANK = 16  # of a matrix product in Triton; smaller ranks are filled up with zeros


@triton.jit
def tile_plus(  # type: ignore[no-untyped-def]
    base,
    left,
    left_stride,
    right,
    right_row_stride,
    right_column_stride,
    rows,
    columns,
    row_count,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Return base[rows, columns] + (left[rows] right[columns]^T) in float32; a RANK of 0 adds nothing.

    `right` is addressed by strides, so that it may lie as (columns, rank) or as (rank, columns).
    """
    inside = (rows[:, None] < row_count) & (columns[None, :] < WIDTH)
    values = tl.load(base + rows[:, None].to(tl.int64) * WIDTH + columns[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    if RANK > 0:
        ranks = tl.arange(0, RANK_BLOCK)
        l_inside = (rows[:, None] < row_count) & (ranks[None, :] < RANK)
        l_tile = tl.load(left + rows[:, None].to(tl.int64) * left_stride + ranks[None, :], mask=l_inside, other=0.0)
        r_inside = (ranks[:, None] < RANK) & (columns[None, :] < WIDTH)
        r_place = columns[None, :] * right_row_stride + ranks[:, None] * right_column_stride
        r_tile = tl.load(right + r_place, mask=r_inside, other=0.0)
        values += tl.dot(l_tile, r_tile, input_precision="ieee")
    return values


@triton.jit(do_not_specialize=VARYING)
def _add_(  # type: ignore[no-untyped-def]
    y, left, ls, right, rr, rc, residual, row_count,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < row_count) & (columns[None, :] < WIDTH)
    place = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    values = tile_plus(y, left, ls, right, rr, rc, rows, columns, row_count, WIDTH, RANK, RANK_BLOCK)
    values += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, values.to(y.dtype.element_ty), mask=inside)


def add_(y: Tensor, plus: tuple[Tensor, Tensor] | None, residual: Tensor) -> Tensor:
    """Return y + left right^T + residual, in the memory of y."""
    args, rank = arguments(plus, y)
    rows, width = y.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    _add_[grid](y, *args, residual, rows, width, rank, rank_block(rank), ROWS, COLUMNS, num_warps=WARPS)
    return y


def rank_block(rank: int) -> int:
    """Return the size of the block that holds `rank`."""
    return max(SMALLEST_RANK, triton.next_power_of_2(max(1, rank)))


def arguments(pair: tuple[Tensor, Tensor] | None, stand_in: Tensor) -> tuple[tuple[object, ...], int]:
    """Return the kernel arguments of left (T, r) and right (columns, r, any strides), and the rank."""
    if pair is None:
        return (stand_in, 0, stand_in, 0, 0), 0
    left, right = pair
    return (left, left.stride(0), right, right.stride(0), right.stride(1)), left.shape[1]
