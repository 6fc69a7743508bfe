"""The backward pass of the gated activation and, on the way, the gradients of the adapter weights that it touches.

    of_gate, of_up   as in swiglu.py
    of B_gate = of_gate^T h_gate,   of B_up = of_up^T h_up,   of A_down = g_down^T activation

Each program keeps a strip of columns and goes down a part of the rows, so these sums stay in registers; the parts are
added up afterwards, in a fixed order. The activation itself is never written, and the widest gradients of the model are
not read again for products with a few columns.

Tiles lie on their side, (columns, rows): so the result of one product is the left operand of the next without leaving
the registers, which is a third of the kernel's time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ludwig_peft_plugin.engine.kernels.low_rank import VARYING, arguments, rank_block

ROWS, COLUMNS, WARPS, STAGES, PARTS = 32, 128, 4, 3, 16

Pair = tuple[Tensor, Tensor]


@triton.jit
def _factor(start, stride, rank_stride, places, count, RANK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return rows `places` of a factor of rank RANK, shape (places, BLOCK), zero outside of it."""
    ranks = tl.arange(0, BLOCK)
    inside = (places[:, None] < count) & (ranks[None, :] < RANK)
    place = places[:, None].to(tl.int64) * stride + ranks[None, :] * rank_stride
    return tl.load(start + place, mask=inside, other=0.0)


@triton.jit
def _plus(values, left, right):  # type: ignore[no-untyped-def]
    return tl.dot(right, tl.trans(left), values.to(tl.float32), input_precision="ieee")


@triton.jit
def _store_sum(sums, part, which, sum, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = ((part * 3 + which) * WIDTH + columns[:, None]) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(sums + places, sum, mask=columns[:, None] < WIDTH)


@triton.jit(do_not_specialize=VARYING)
def _swiglu_adapters_backward_(  # type: ignore[no-untyped-def]
    gate, gl, gls, gr, grr, grc, up, ul, uls, ur, urr, urc, grad, dl, dls, dr, drr, drc, sums, row_count, part_rows,
    WIDTH: tl.constexpr, G_RANK: tl.constexpr, U_RANK: tl.constexpr, D_RANK: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    right_gate = _factor(gr, grr, grc, columns, WIDTH, G_RANK, BLOCK)
    right_up = _factor(ur, urr, urc, columns, WIDTH, U_RANK, BLOCK)
    right_down = _factor(dr, drr, drc, columns, WIDTH, D_RANK, BLOCK)
    of_gate_b = tl.zeros([COLUMNS, BLOCK], tl.float32)
    of_up_b = tl.zeros([COLUMNS, BLOCK], tl.float32)
    of_down_a = tl.zeros([COLUMNS, BLOCK], tl.float32)
    kind = gate.dtype.element_ty
    first = tl.program_id(1) * part_rows
    for begin in range(first, tl.minimum(first + part_rows, row_count), ROWS):
        rows = begin + tl.arange(0, ROWS)
        h_gate = _factor(gl, gls, 1, rows, row_count, G_RANK, BLOCK)
        h_up = _factor(ul, uls, 1, rows, row_count, U_RANK, BLOCK)
        g_down = _factor(dl, dls, 1, rows, row_count, D_RANK, BLOCK)
        inside = (columns[:, None] < WIDTH) & (rows[None, :] < row_count)
        place = rows[None, :].to(tl.int64) * WIDTH + columns[:, None]
        gates = _plus(tl.load(gate + place, mask=inside, other=0.0), h_gate, right_gate)
        ups = _plus(tl.load(up + place, mask=inside, other=0.0), h_up, right_up)
        grads = _plus(tl.load(grad + place, mask=inside, other=0.0), g_down, right_down)
        sigmoid = tl.sigmoid(gates)
        silu = gates * sigmoid
        of_gate = (grads * ups * (sigmoid * (1.0 + gates * (1.0 - sigmoid)))).to(kind)
        of_up = (grads * silu).to(kind)
        activation = (silu * ups).to(kind)
        tl.store(gate + place, of_gate, mask=inside)
        tl.store(up + place, of_up, mask=inside)
        of_gate_b = tl.dot(of_gate, h_gate, of_gate_b, input_precision="ieee")
        of_up_b = tl.dot(of_up, h_up, of_up_b, input_precision="ieee")
        of_down_a = tl.dot(activation, g_down, of_down_a, input_precision="ieee")
    _store_sum(sums, part, 0, of_gate_b, columns, WIDTH, BLOCK)
    _store_sum(sums, part, 1, of_up_b, columns, WIDTH, BLOCK)
    _store_sum(sums, part, 2, of_down_a, columns, WIDTH, BLOCK)


def swiglu_adapters_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, gate_plus: Pair, up_plus: Pair, grad_plus: Pair
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, in their memory, and those of both B (F, r) and of A (r, F), float32."""
    (g_args, g_rank), (u_args, u_rank) = arguments(gate_plus, gate), arguments(up_plus, up)
    d_args, d_rank = arguments(grad_plus, grad)
    rows, width = gate.shape
    block = rank_block(max(g_rank, u_rank, d_rank))
    part_rows = triton.cdiv(triton.cdiv(rows, PARTS), ROWS) * ROWS
    parts = triton.cdiv(rows, part_rows)
    sums = torch.empty((parts, 3, width, block), dtype=torch.float32, device=gate.device)
    grid = (triton.cdiv(width, COLUMNS), parts)
    sizes = (width, g_rank, u_rank, d_rank, block, ROWS, COLUMNS)
    _swiglu_adapters_backward_[grid](
        gate, *g_args, up, *u_args, grad, *d_args, sums, rows, part_rows, *sizes, num_warps=WARPS, num_stages=STAGES
    )
    of_gate_b, of_up_b, of_down_a = sums.sum(dim=0)
    return gate, up, of_gate_b[:, :g_rank], of_up_b[:, :u_rank], of_down_a[:, :d_rank].T
