r"""Stacked frozen layers with the LoRA of some or all of them: their outputs, and the gradients of x, h and B.

    y = x W^T + b + h B^T,    dh = g B,   dx = g W (+ dh A),   dB_i = s_i g_i^T h_i

B holds the adapters' s_i B_i. Where all have one rank it is block-diagonal and multiplied at once (diagonal.py); else
each adapter reads its own columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ludwig_peft_plugin.engine.columns import side_by_side
from ludwig_peft_plugin.engine.fused.diagonal import diagonal_blocks
from ludwig_peft_plugin.engine.fused.products import product_fp32
from ludwig_peft_plugin.engine.fused.stack import StackedLinear


class AdaptedStack:
    """Stacked layers and what their adapters need beside A.

    Args:
        stack: the frozen halves.
        ranks: of each layer's adapter, None for a layer without.
        scalings: of the adapters, in the same order.
        dtype: of the computation.
    """

    def __init__(
        self, stack: StackedLinear, ranks: list[int | None], scalings: list[float], dtype: torch.dtype
    ) -> None:
        self.stack = stack
        self.scalings = scalings
        self.adapted = [index for index, rank in enumerate(ranks) if rank is not None]
        self.ranks = [rank for rank in ranks if rank is not None]
        like = torch.empty(0, dtype=dtype, device=stack.layers[0].layer.weight.device)
        self.blocks = diagonal_blocks(stack.sizes, ranks, like)
        alone = (like.new_empty((stack.sizes[i], rank)) for i, rank in zip(self.adapted, self.ranks, strict=True))
        self.b = list(alone) if self.blocks is None else self.blocks.parts
        """Each adapter's s B (out, r), to be written to."""

    def forward(self, x: Tensor, h: Tensor | None) -> list[Tensor]:
        """Return the layers' outputs (T, out_i), columns of one matrix.

        Args:
            x: the common input, shape (T, in).
            h: x A^T, shape (T, sum of ranks); None leaves the adapters' share out.
        """
        y = self.stack.forward(x)
        outputs = self.stack.split(y)
        if h is not None and self.blocks is not None:
            y.addmm_(h, self.blocks.matrix().T)
        elif h is not None:
            for index, b, columns in zip(self.adapted, self.b, h.split(self.ranks, dim=1), strict=True):
                outputs[index].addmm_(columns, b.T)
        return outputs

    def gradients(
        self, h: Tensor | None, grads: list[Tensor], of_b: list[Tensor] | None, *, needed: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Return g W (T, in), that of h (T, sum of ranks), and those of B (out_i, r_i) in float32.

        Args:
            h: what the adapters' A made of the input; None where there are none.
            grads: gradients of the outputs, each (T, out_i).
            of_b: g_i^T h_i of every layer, where the caller has them already.
            needed: whether g W is wanted.
        """
        grad = side_by_side(grads)
        total = self.stack.input_gradient(grad) if needed else None
        if h is None:
            return total, None, []
        grads = self.stack.split(grad)
        products = None if of_b is None else [of_b[index] for index in self.adapted]
        if self.blocks is not None:
            grad_h = grad @ self.blocks.matrix()
            if products is None:
                products = self.blocks.diagonal(product_fp32(grad.T, h))
        else:
            grad_h = torch.empty_like(h)
            for index, b, columns in zip(self.adapted, self.b, grad_h.split(self.ranks, dim=1), strict=True):
                torch.mm(grads[index], b, out=columns)
            if products is None:
                inputs = zip(self.adapted, h.split(self.ranks, dim=1), strict=True)
                products = [product_fp32(grads[index].T, columns) for index, columns in inputs]
        return total, grad_h, list(torch._foreach_mul(products, self.scalings))
