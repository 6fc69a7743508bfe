r"""Frozen layers that read the same input as one layer, so that one product stands for several.

    (y_1, y_2, ...) = x W^T + b,   W = (W_1; W_2; ...) (sum of out, in),   dx = (g_1, g_2, ...) W

The layers' outputs are neighbouring columns of one matrix, and so are the gradients of them where whoever makes those
lays them out alike. Plain weights are moved in memory once, to lie below one another: each layer keeps its own weight,
a contiguous row slice of W, so nothing is held twice and what reads or writes a layer's weight goes on doing so. 4-bit
weights stay where they are and are dequantised into one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ludwig_peft_plugin.engine.frozen import DenseLinear, FourBitLinear, FrozenLinear

ALIGNMENT = 16
"""Bytes to whose multiples rows and columns must start for fast loads; other layers are left apart."""


class StackedLinear:
    """Layers whose weights are row slices of one matrix.

    The matrix itself is not kept: it is what the first weight's memory holds, and goes when the weights are moved.
    """

    def __init__(self, layers: list[DenseLinear]) -> None:
        self.layers = layers
        self.sizes = [int(layer.layer.out_features) for layer in layers]

    @property
    def biases(self) -> list[Tensor]:
        """The layers' biases: of all of them or of none."""
        return [layer.bias for layer in self.layers if layer.bias is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (T, sum of out), for x (T, in)."""
        bias = _as_one(self.biases) if self.biases else None
        return F.linear(x, self.weight(x.dtype), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return grad W, shape (T, in), for grad (T, sum of out)."""
        return grad @ self.weight(grad.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return W in the dtype of the computation."""
        return _as_one([layer.layer.weight for layer in self.layers])

    def split(self, y: Tensor) -> list[Tensor]:
        """Return the layers' columns (T, out_i) of y (T, sum of out), as views."""
        return list(y.split(self.sizes, dim=1))


class StackedFourBit(StackedLinear):
    """4-bit layers, dequantised into one matrix for each product."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        first = self.layers[0].layer
        matrix = torch.empty((sum(self.sizes), first.in_features), dtype=dtype, device=first.weight.device)
        for layer, rows in zip(self.layers, matrix.split(self.sizes), strict=True):
            assert isinstance(layer, FourBitLinear)
            layer.write_weight(rows)
        return matrix


def stacked(members: Sequence[FrozenLinear], dtype: torch.dtype) -> StackedLinear | None:
    """Return the layers as one, their weights and biases moved below one another, or None where they stay apart.

    Args:
        members: layers of the same input.
        dtype: that of the activations.
    """
    layers = [member for member in members if type(member) in (DenseLinear, FourBitLinear)]
    if len(layers) < 2 or len(layers) < len(members) or len({type(layer) for layer in layers}) > 1:
        return None
    dense = [layer for layer in layers if isinstance(layer, DenseLinear)]
    four_bit = isinstance(dense[0], FourBitLinear)
    biases = [layer.bias for layer in dense if layer.bias is not None]
    weights = [] if four_bit else [layer.layer.weight for layer in dense]
    widths = [layer.layer.in_features for layer in dense] + [layer.layer.out_features for layer in dense]
    if len(biases) not in (0, len(dense)) or any(width * dtype.itemsize % ALIGNMENT for width in widths):
        return None
    if len({layer.layer.weight.device for layer in dense}) > 1 or not _can_move([*biases, *weights], dtype):
        return None
    for tensors in (biases, weights):
        if tensors and not _lie_together(tensors):
            _move_together(tensors)
    return StackedFourBit(dense) if four_bit else StackedLinear(dense)


def _can_move(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    """Return whether these are different plain tensors of one device in the dtype of the computation."""
    plain = all(type(tensor) in (nn.Parameter, Tensor) and tensor.dtype == dtype for tensor in tensors)
    alike = len({(tensor.device, tensor.shape[1:]) for tensor in tensors if tensor.dim() == 2}) < 2
    return plain and alike and len({id(tensor) for tensor in tensors}) == len(tensors)


def _lie_together(tensors: list[Tensor]) -> bool:
    """Return whether each tensor begins where the one before ends; those without data (meta) need not be moved."""
    storage, place = tensors[0].untyped_storage()._cdata, tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.is_meta:
            continue
        if tensor.untyped_storage()._cdata != storage or tensor.storage_offset() != place:
            return False
        if not tensor.is_contiguous():
            return False
        place += tensor.numel()
    return True


def _move_together(tensors: list[Tensor]) -> None:
    """Give each tensor the same numbers in memory next to that of the one before."""
    whole = torch.cat([tensor.data for tensor in tensors])
    for tensor, rows in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = rows
    if whole.is_cuda:
        torch.cuda.empty_cache()  # the places left are too small for the next layer's matrix


def _as_one(tensors: list[Tensor]) -> Tensor:
    """Return tensors that lie together as one, (sum of lengths, ...); for those without data, one of that shape."""
    first = tensors[0].detach()
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return first[:1].expand(shape) if first.is_meta else first.as_strided(shape, first.stride())
