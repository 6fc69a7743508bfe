"""What the memory of single operations is on a GPU where a meta tensor cannot tell.

Some kernels hold scratch memory while they run, and some operations give results whose size depends on data. Both are
listed here by the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL_FLOATS = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], distinct: int) -> Any:
    """Return what an operation whose result depends on data would give, None for all others.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: its arguments by name.
        distinct: how many distinct values a tensor has at most.
    """
    name = func._schema.name
    if name == "aten::_unique2":
        values = min(args[0].numel(), distinct)
        return args[0].new_empty(values), torch.empty_like(args[0]), args[0].new_empty(0)
    make = _STAND_INS.get(name)
    return None if make is None else make(*args, **kwargs)


def workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes a GPU kernel takes while it runs, beside its inputs and results."""
    size = _WORKSPACES.get(func._schema.name)
    return 0 if size is None else size(*args, **kwargs)


def dequantizes(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the result of an operation is a dequantised weight."""
    name: str = func._schema.name
    if name == "aten::_to_copy":
        return isinstance(args[0], Tensor) and args[0].dtype in SMALL_FLOATS
    return name in ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")


def needs_weight(func: Any) -> bool:
    """Return whether the workspace of an operation is a dequantised weight."""
    return bool(func._schema.name == "bitsandbytes::gemm_4bit")


def _scalar(tensor: Tensor) -> float | int | bool | None:
    """Return a number for a scalar without data; only its being finite and positive matters to what asks."""
    if tensor.device.type != "meta":
        return None
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _copy(tensor: Tensor, **kwargs: Any) -> Tensor | None:
    """A copy on the host cannot be made of nothing; it stays without data."""
    device = kwargs.get("device")
    if tensor.device.type != "meta" or device is None or torch.device(device).type == "meta":
        return None
    return tensor.new_empty(tensor.shape, dtype=kwargs.get("dtype"))


def _quantised_rows(tensor: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """bitsandbytes' int8 rows, without outlier columns: their number depends on the data and is small."""
    rows = tensor.numel() // tensor.shape[-1]
    outliers = tensor.new_empty(0, dtype=torch.int64) if threshold else None
    return tensor.new_empty(tensor.shape, dtype=torch.int8), tensor.new_empty(rows, dtype=torch.float32), outliers


def _int8_product(activations: Tensor, rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    shape = (*rows.shape[:-1], weight.shape[0])
    return activations.new_empty(shape), activations.new_empty(0)


def _int8_product_workspace(activations: Tensor, rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """The int32 product and its float16 value."""
    return rows.numel() // rows.shape[-1] * weight.shape[0] * (4 + 2)


def _int8_rows_workspace(tensor: Tensor, threshold: float = 0.0) -> int:
    """Looking for outliers makes the absolute values and a mask of them."""
    return tensor.numel() * (tensor.element_size() + 1) if threshold else 0


def _four_bit_product_workspace(
    activations: Tensor, packed: Tensor, shape: Any, absmax: Tensor, blocksize: int, *_: Any, **__: Any
) -> int:
    """bitsandbytes dequantises the weight (and its float32 scales) for batches of more than a few dozen rows."""
    numbers = int(shape[0]) * int(shape[1])
    return numbers * activations.element_size() + numbers // blocksize * 4


def _flash_backward_workspace(grad: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Flash attention adds up dQ in float32 and, where heads share keys, makes dK and dV for every query head."""
    tokens, heads, width = query.shape
    shared = 2 * tokens * heads * width * key.element_size() if key.shape[1] != heads else 0
    return tokens * heads * (width + 1) * 4 + shared


def _embedding_backward_workspace(grad: Tensor, *_: Any, **__: Any) -> int:
    """The rows of the gradient are sorted by token and added up in float32."""
    return grad.numel() * 4


_STAND_INS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _scalar,
    "aten::_to_copy": _copy,
    "bitsandbytes::int8_vectorwise_quant": _quantised_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_product,
}

_WORKSPACES: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": _four_bit_product_workspace,
    "bitsandbytes::int8_vectorwise_quant": _int8_rows_workspace,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_product_workspace,
    "bitsandbytes::int8_scaled_mm": _int8_product_workspace,
    "torch_attn::_varlen_attn_backward": _flash_backward_workspace,
    "aten::embedding_dense_backward": _embedding_backward_workspace,
}
