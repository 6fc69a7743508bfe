r"""The B of LoRA in layers whose outputs are neighbouring columns, as one block-diagonal matrix.

    y += h B^T,   dh = g B,   dB = g^T h,     B = diag(B_1, B_2, ...) (sum of out, sum of ranks)

Zeros are multiplied along, but at small ranks these products wait for memory, and y and g are read once instead of once
for each layer.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

MOST_RANKS = 192
"""Sum of ranks beyond which the zeros cost more than they save."""


class DiagonalBlocks:
    """The B (out_i, r) of adapters with the same rank, below one another, with zeros for layers without an adapter.

    That is the form in which they are kept, since it lets all of them be written at once; the block-diagonal matrix is
    made for each product.

    Args:
        sizes: out_i of every layer.
        adapted: which of them have an adapter.
        rank: of each adapter.
        like: a tensor of the dtype and on the device of the computation.
    """

    def __init__(self, sizes: list[int], adapted: list[bool], rank: int, like: Tensor) -> None:
        ends = list(accumulate(sizes))
        self.rank = rank
        self.rows = [slice(end - size, end) for size, end, one in zip(sizes, ends, adapted, strict=True) if one]
        self.below = like.new_zeros((ends[-1], rank))
        self.mask = like.new_zeros((ends[-1], len(self.rows), 1), dtype=torch.bool)
        for column, rows in enumerate(self.rows):
            self.mask[rows, column] = True

    @property
    def parts(self) -> list[Tensor]:
        """Each adapter's B (out_i, r), to be written to."""
        return [self.below[rows] for rows in self.rows]

    def matrix(self) -> Tensor:
        """Return the block-diagonal matrix (sum of out, sum of ranks)."""
        return (self.below[:, None, :] * self.mask).flatten(1)

    def diagonal(self, matrix: Tensor) -> list[Tensor]:
        """Return the blocks of a matrix of that shape."""
        return [matrix[rows, column * self.rank : (column + 1) * self.rank] for column, rows in enumerate(self.rows)]


def diagonal_blocks(sizes: list[int], ranks: list[int | None], like: Tensor) -> DiagonalBlocks | None:
    """Return room for the B of layers with these ranks (None: no adapter), or None where they are multiplied apart."""
    found = [rank for rank in ranks if rank is not None]
    if not found or len(set(found)) > 1 or sum(found) > MOST_RANKS:
        return None
    return DiagonalBlocks(sizes, [rank is not None for rank in ranks], found[0], like)
