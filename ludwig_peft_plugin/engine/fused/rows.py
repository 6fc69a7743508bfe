"""Some rows of a matrix: what the last decoder layer goes on with once attention has mixed the tokens.

Behind the last attention a token's state depends on no other token, and only states that predict a target are read. So
the output projection and the feed-forward block of the last layer run on these rows alone; the gradient of all others
is zero there, in the plain computation as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SelectRows(torch.autograd.Function):
    """x (T, n) and indices (M,), each once -> x[indices] (M, n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.indices, ctx.count = indices, len(x)
        return x[indices]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # Written, not added: no index occurs twice, and adding 16-bit numbers takes atomic operations.
        return grads[0].new_zeros(ctx.count, grads[0].shape[1]).index_copy_(0, ctx.indices, grads[0]), None


def select_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of x (T, n) at `indices` (M,), int64, none of which may occur twice; shape (M, n)."""
    selected: Tensor = SelectRows.apply(x, indices)
    return selected


def filled_up(indices: Tensor, count: int, total: int) -> Tensor:
    """Return `indices`, ascending, and behind them other numbers below `total`, each once, up to `count` in all."""
    others = torch.ones(total, dtype=torch.int8, device=indices.device).index_fill_(0, indices, 0)
    return others.argsort(stable=True)[:count]
