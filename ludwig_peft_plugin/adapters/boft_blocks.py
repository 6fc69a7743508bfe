"""BOFT's block-diagonal matrices in PyTorch, in the place of the CUDA extension that PEFT compiles for them.

PEFT tries to compile it for every adapted layer, with a compiler that need not be there, and where that fails it sets
`boft_n_butterfly_factor` to 1 without an error. One config would then train different adapters on different machines.
"""

from __future__ import annotations

import torch
from peft.tuners.boft import layer as peft_layer
from torch import Tensor


class BlockDiagonal:
    """Has the interface of the extension's autograd function."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        """Return block-diagonal matrices of shape (N, D * H, D * H) from their blocks, shape (N, D, H, H)."""
        return torch.stack([torch.block_diag(*torch.unbind(matrix)) for matrix in blocks])


def compute_without_extension() -> None:
    """Have PEFT's BOFT layers of this process use `BlockDiagonal`."""
    peft_layer.FastBlockDiag = BlockDiagonal
    peft_layer.get_fbd_cuda = lambda: BlockDiagonal
