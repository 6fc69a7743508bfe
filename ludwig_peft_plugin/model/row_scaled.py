r"""Frozen linear layers whose weight is rows of 8-bit numbers with a scale each.

    y = x W^T + b,    W \approx scale \odot weight

The weight is dequantised for each product, which then is exact, and takes no more memory than the layer's own while it
lasts. Gradients flow to x and to the bias; the weight is not trained. `Int8Linear` is this with integers; float8.py has
the layer that also multiplies in 8 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.model.dequantize import Dequantizer, register_dequantizer


class RowScaledLinear(nn.Linear):
    """A linear layer whose weight is rows of 8-bit numbers with a scale each.

    Attributes:
        weight: shape (out, in), in the storage dtype of the subclass. Before `store` it is empty, on the meta device.
        scale: float32, shape (out, 1).
        compute_dtype: of the activations the layer was made for. PEFT makes new adapter weights in it.
        source_cls: the class of the layer this one took the place of, `nn.Linear` or transformers' `Conv1D`.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        compute_dtype: torch.dtype,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=compute_dtype)
        self.requires_grad_(False)
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=torch.float32, device="meta"))
        self.compute_dtype = compute_dtype
        self.source_cls = source_cls

    @staticmethod
    @abstractmethod
    def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight, shape (out, in), in the storage dtype, and its scales, float32, shape (out, 1)."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return a rounded copy of a linear layer, on its device."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        layer.store(*cls.round_rows(linear.weight.detach()))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer.train(linear.training)

    def store(self, weight: Tensor, scale: Tensor) -> None:
        """Take rounded rows, shape (out, in), and their scales, shape (out, 1), as the layer's weight."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale

    def dequantize(self) -> Tensor:
        """Return the weight that the forward pass multiplies with, shape (out, in), in the compute dtype."""
        return dequantize_rows(self.weight, self.scale, self.compute_dtype)

    @property
    def W_q(self) -> Tensor:
        """The stored weight. PEFT calls `dequantize` of layers that have this name, HQQ's, where it needs numbers."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (..., out), in the dtype of `x`, shape (..., in)."""
        y: Tensor = _DequantizedProduct.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return what the layer holds."""
        return f"{super().extra_repr()}, weight={self.weight.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices; a change of dtype concerns the bias alone."""
        weight, buffers = self._parameters.pop("weight"), self._buffers
        self._buffers = {}
        super()._apply(fn, recurse)
        assert weight is not None
        self._parameters = {"weight": nn.Parameter(_moved(weight, fn), requires_grad=False), **self._parameters}
        self._buffers = {name: None if buffer is None else _moved(buffer, fn) for name, buffer in buffers.items()}
        return self


class Int8Linear(RowScaledLinear):
    """A linear layer whose weight is int8 rows: w8 = round(127 w / m), m the row's largest absolute number."""

    @staticmethod
    def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight, shape (out, in), as int8, and its scales, float32, shape (out, 1)."""
        values = weight.float()
        largest = values.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-100)
        return (values * (127.0 / largest)).round().to(torch.int8), largest * (1.0 / 127.0)


def dequantize_rows(rows: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers that 8-bit rows (M, K) and their scales (M, 1) stand for, rounded once to `dtype`."""
    return rows.float().mul_(scale).to(dtype)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return where `fn` takes a tensor, in the tensor's own dtype."""
    result = fn(tensor.detach())
    return result if result.dtype == tensor.dtype else tensor.detach().to(result.device)


class _DequantizedProduct(torch.autograd.Function):
    """x W^T with W dequantised in both passes, instead of kept for the backward pass in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ dequantize_rows(weight, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ dequantize_rows(weight, scale, gradient.dtype), None, None


register_dequantizer(
    Dequantizer(
        name="8-bit rows",
        matches=lambda layer: isinstance(layer, RowScaledLinear),
        weight=lambda layer: dequantize_rows(layer.weight, layer.scale),
    )
)
