"""The frozen half of an adapted linear layer: y = x W^T + b and the gradient of x, whatever W is stored as."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenLinear(Protocol):
    """A linear layer whose weight W (out, in) and bias b (out,) are not trained."""

    @property
    def bias(self) -> Tensor | None:
        """b, or None for a layer without."""

    def prepare(self, x: Tensor) -> Any:
        """Return `x`, shape (T, in), as `forward` takes it; layers of the same class share the result."""

    def forward(self, prepared: Any) -> Tensor:
        """Return x W^T without the bias, shape (T, out)."""

    def input_gradient(self, grad: Tensor, total: Tensor | None) -> tuple[Tensor, ...]:
        """Return tensors that add up to `total` + grad W, each (T, in); `total` may be overwritten."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return W in the dtype of the computation."""


class DenseLinear:
    """A weight kept as it is multiplied."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.bias: Tensor | None = layer.bias

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def forward(self, prepared: Tensor) -> Tensor:
        return F.linear(prepared, self.weight(prepared.dtype))

    def input_gradient(self, grad: Tensor, total: Tensor | None) -> tuple[Tensor, ...]:
        weight = self.weight(grad.dtype)
        return (grad @ weight if total is None else total.addmm_(grad, weight),)

    def weight(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.layer.weight
        return weight


class FourBitLinear(DenseLinear):
    """A bitsandbytes NF4 or FP4 weight, dequantised once in the forward and once in the backward pass."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        weight: Any = self.layer.weight
        if weight.is_cuda:
            from ludwig_peft_plugin.engine.kernels.nf4 import dequantize

            return dequantize(weight.data, weight.quant_state)
        import bitsandbytes.functional as bnb

        dense: Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
        return dense


def frozen_linear(layer: nn.Module, dtype: torch.dtype) -> FrozenLinear | str:
    """Return how to multiply with `layer`, or why that is left to the layer itself.

    Args:
        layer: a linear layer of the base.
        dtype: that of the activations.
    """
    kind = type(layer)
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "a base layer is trained itself"
    if kind is nn.Linear:
        return DenseLinear(layer) if layer.weight.dtype == dtype else f"weights in {layer.weight.dtype}"
    if kind.__module__.startswith("bitsandbytes") and kind.__name__ == "Linear4bit":
        return _four_bit(layer, dtype)
    if kind.__name__ in ("Float8Linear", "Int8Linear"):
        from ludwig_peft_plugin.engine.frozen_float8 import row_scaled_linear

        return row_scaled_linear(layer)
    return f"{kind.__name__} layers"


def _four_bit(layer: Any, dtype: torch.dtype) -> FrozenLinear | str:
    state = getattr(layer.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "4-bit weights in a layout of the processor's own"
    if state.dtype != dtype or layer.compute_dtype not in (None, dtype):
        return f"4-bit weights that are multiplied in {layer.compute_dtype or state.dtype}"
    return FourBitLinear(layer)
