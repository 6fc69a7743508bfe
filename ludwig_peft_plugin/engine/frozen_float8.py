"""Base layers in 8-bit rows as the fused layers read them; float8 inputs are rounded once for all that share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.engine.frozen import DenseLinear, FrozenLinear
from ludwig_peft_plugin.model.float8_arithmetic import float8_input_gradient, float8_matmul, quantize_rows
from ludwig_peft_plugin.model.row_scaled import dequantize_rows

Rounded = tuple[Tensor, Tensor, torch.dtype]
"""Float8 rows (T, in), their scales (T, 1), and the dtype of the numbers they were."""


class Float8Units:
    """A weight that the GPU multiplies in float8, activations and gradients rounded to float8 rows."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.bias: Tensor | None = layer.bias

    def prepare(self, x: Tensor) -> Rounded:
        return *quantize_rows(x), x.dtype

    def forward(self, prepared: Rounded) -> Tensor:
        x8, scale, dtype = prepared
        return float8_matmul(x8, scale, self.layer.weight, self.layer.scale, dtype)

    def input_gradient(self, grad: Tensor, total: Tensor | None) -> tuple[Tensor, ...]:
        product = float8_input_gradient(grad, self.layer.weight, self.layer.scale, self.layer.weight_t)
        return (product,) if total is None else (total, product)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return dequantize_rows(self.layer.weight, self.layer.scale).to(dtype)


class StoredRows(DenseLinear):
    """A weight kept in 8-bit rows that is dequantised for each product."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        return dequantize_rows(self.layer.weight, self.layer.scale).to(dtype)


def row_scaled_linear(layer: nn.Module) -> FrozenLinear:
    """Return how to multiply with a `Float8Linear` or an `Int8Linear`."""
    return Float8Units(layer) if getattr(layer, "multiplies_in_float8", False) else StoredRows(layer)
