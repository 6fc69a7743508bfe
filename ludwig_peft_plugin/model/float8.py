r"""A frozen linear layer that multiplies in float8: half the memory of bfloat16, and up to twice its speed.

    y = x W^T + b,    W \approx scale \odot weight

On GPUs with float8 units, rows of x (and of the gradient of y, in the backward pass) are rounded to float8 as well and
multiplied there. Elsewhere the layer saves memory alone: it multiplies with the dequantised weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.model.float8_arithmetic import (
    float8_input_gradient,
    float8_matmul,
    has_float8_units,
    quantize_rows,
)
from ludwig_peft_plugin.model.row_scaled import RowScaledLinear

ALIGNMENT = 16
"""Float8 units multiply matrices whose sides are multiples of this."""


class Float8Linear(RowScaledLinear):
    """A linear layer whose weight is float8 rows (e4m3).

    Attributes:
        weight_t: the numbers of `weight` transposed, shape (in, out), contiguous, where a copy is kept for the
            backward pass of float8 units; else None.
        multiplies_in_float8: whether activations and gradients are rounded to float8 too, and multiplied there.
    """

    weight_t: Tensor | None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.register_buffer("weight_t", None, persistent=False)
        self.multiplies_in_float8 = False

    @staticmethod
    def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight, shape (out, in), as float8, and its scales, float32, shape (out, 1)."""
        return quantize_rows(weight)

    def store(self, weight: Tensor, scale: Tensor) -> None:
        """Take float8 rows, shape (out, in), and their scales, shape (out, 1), as the layer's weight."""
        super().store(weight, scale)
        self.weight_t = None
        self._choose_units()

    def keep_transposed(self, keep: bool = True) -> None:
        """Keep a transposed copy of the weight for the backward pass, or drop it.

        It changes no result: without it, float8 units get one that is made in each backward pass.
        """
        self.weight_t = self.weight.detach().t().contiguous() if keep and self.multiplies_in_float8 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (..., out), in the dtype of `x`, shape (..., in)."""
        if not self.multiplies_in_float8:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        product: Tensor = _Float8Product.apply(rows, self.weight, self.scale, self.weight_t)
        y = product.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, of which some have float8 units."""
        super()._apply(fn, recurse)
        self._choose_units()
        return self

    def _choose_units(self) -> None:
        aligned = self.in_features % ALIGNMENT == 0 and self.out_features % ALIGNMENT == 0
        self.multiplies_in_float8 = aligned and has_float8_units(self.weight.device)


class _Float8Product(torch.autograd.Function):
    """x W^T with x and the gradient of the product rounded to float8 rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, weight_t: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale, weight_t)
        x8, x_scale = quantize_rows(x)
        return float8_matmul(x8, x_scale, weight, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale, weight_t = ctx.saved_tensors
        return float8_input_gradient(gradient, weight, scale, weight_t), None, None, None


def keep_transposed_copies(model: nn.Module, keep: bool = True) -> None:
    """Have every float8 layer of `model` that multiplies in float8 keep a transposed copy for training, or drop it.

    The copies cost as much memory as the weights and save their transposition in every backward pass.
    """
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.keep_transposed(keep)
