"""Sparse matrices without data, of which PyTorch has no form on the meta device that can be computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _EmptySparse(torch.autograd.Function):
    """Makes a matrix that takes no memory, and keeps its places until the backward pass, in which values are picked."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        # A sparse matrix counts its places in 64 bits, so it has a copy of them.
        ctx.save_for_backward(places.new_empty(places.shape, dtype=torch.int64))
        ctx.values = values.shape
        return values.new_empty(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].new_empty(ctx.values), None, None


def empty_sparse(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a matrix in the place of `torch.sparse_coo_tensor(places, values, shape)` on the meta device.

    Args:
        values: shape (entries,), which get a gradient.
        places: row and column of each value, shape (2, entries).
        shape: rows and columns.

    Returns:
        A strided matrix that takes up no memory itself; `contiguous` makes it the dense one.
    """
    matrix: Tensor = _EmptySparse.apply(values, places, shape)
    return matrix
