"""`torch.autocast` for meta tensors, which it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.estimate.replace import replaced

LOWER: dict[Any, tuple[str, ...]] = {
    F: ("linear", "scaled_dot_product_attention"),
    torch: ("matmul", "bmm", "addmm", "baddbmm"),
    Tensor: ("matmul", "__matmul__", "bmm"),
}
"""Functions that compute in 16 bits."""

FLOAT: dict[Any, tuple[str, ...]] = {
    F: ("layer_norm", "rms_norm", "cross_entropy", "softmax"),
    torch: ("softmax", "rsqrt"),
    Tensor: ("softmax", "pow", "rsqrt"),
}
"""Functions that compute in float32."""


@contextmanager
def autocast_view(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, products of meta tensors are made in `dtype`, norms, softmax and losses in float32.

    Trained weights are cast once, as PyTorch does; what they were cast to is kept.
    """
    weights: dict[int, Tensor] = {}

    def lowered(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in weights:
            weights[id(value)] = value.to(dtype)
        return weights[id(value)]

    def raised(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value

    with ExitStack() as stack:
        for cast, functions in ((lowered, LOWER), (raised, FLOAT)):
            for owner, names in functions.items():
                stack.enter_context(replaced(owner, {name: _cast(getattr(owner, name), cast) for name in names}))
        yield


def _cast(function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return `function` with its tensors cast first, where they are meta tensors."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.device.type == "meta" for arg in args):
            return function(*args, **kwargs)
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return wrapped
