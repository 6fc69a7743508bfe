"""The gated activation of Llama-like feed-forward blocks, with the LoRA of its inputs added on the way in.

Adding LoRA here instead of to the outputs of the matrix products saves reading and writing the widest tensors of the
model once more in each direction (see elementwise.py for what is computed).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ludwig_peft_plugin.engine.kernels.low_rank import COLUMNS, ROWS, VARYING, WARPS, arguments, rank_block, tile_plus


@triton.jit(do_not_specialize=VARYING)
def _swiglu(  # type: ignore[no-untyped-def]
    gate, gl, gls, gr, grr, grc, up, ul, uls, ur, urr, urc, result, row_count,
    WIDTH: tl.constexpr, G_RANK: tl.constexpr, G_BLOCK: tl.constexpr, U_RANK: tl.constexpr, U_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gates = tile_plus(gate, gl, gls, gr, grr, grc, rows, columns, row_count, WIDTH, G_RANK, G_BLOCK)
    ups = tile_plus(up, ul, uls, ur, urr, urc, rows, columns, row_count, WIDTH, U_RANK, U_BLOCK)
    inside = (rows[:, None] < row_count) & (columns[None, :] < WIDTH)
    place = result + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(place, (gates * tl.sigmoid(gates) * ups).to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _swiglu_backward_(  # type: ignore[no-untyped-def]
    gate, gl, gls, gr, grr, grc, up, ul, uls, ur, urr, urc, grad, dl, dls, dr, drr, drc, row_count,
    WIDTH: tl.constexpr, G_RANK: tl.constexpr, G_BLOCK: tl.constexpr, U_RANK: tl.constexpr, U_BLOCK: tl.constexpr,
    D_RANK: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gates = tile_plus(gate, gl, gls, gr, grr, grc, rows, columns, row_count, WIDTH, G_RANK, G_BLOCK)
    ups = tile_plus(up, ul, uls, ur, urr, urc, rows, columns, row_count, WIDTH, U_RANK, U_BLOCK)
    grads = tile_plus(grad, dl, dls, dr, drr, drc, rows, columns, row_count, WIDTH, D_RANK, D_BLOCK)
    sigmoid = tl.sigmoid(gates)
    silu = gates * sigmoid
    slope = sigmoid * (1.0 + gates * (1.0 - sigmoid))
    inside = (rows[:, None] < row_count) & (columns[None, :] < WIDTH)
    place = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    kind = gate.dtype.element_ty
    tl.store(gate + place, (grads * ups * slope).to(kind), mask=inside)
    tl.store(up + place, (grads * silu).to(kind), mask=inside)
    tl.store(grad + place, (silu * ups).to(kind), mask=inside)


Pair = tuple[Tensor, Tensor] | None


def swiglu(gate: Tensor, up: Tensor, gate_plus: Pair, up_plus: Pair) -> Tensor:
    """Return silu(gate + ...) * (up + ...)."""
    result = torch.empty_like(gate)
    (g_args, g_rank), (u_args, u_rank) = arguments(gate_plus, gate), arguments(up_plus, up)
    rows, width = gate.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    sizes = (width, g_rank, rank_block(g_rank), u_rank, rank_block(u_rank), ROWS, COLUMNS)
    _swiglu[grid](gate, *g_args, up, *u_args, result, rows, *sizes, num_warps=WARPS)
    return result


def swiglu_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, gate_plus: Pair, up_plus: Pair, grad_plus: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both gradients and the activation, in the memory of `gate`, `up` and `grad`."""
    (g_args, g_rank), (u_args, u_rank) = arguments(gate_plus, gate), arguments(up_plus, up)
    d_args, d_rank = arguments(grad_plus, grad)
    rows, width = gate.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    ranks = (g_rank, rank_block(g_rank), u_rank, rank_block(u_rank), d_rank, rank_block(d_rank))
    _swiglu_backward_[grid](
        gate, *g_args, up, *u_args, grad, *d_args, rows, width, *ranks, ROWS, COLUMNS, num_warps=WARPS
    )
    return gate, up, grad
