"""Run code that asks meta tensors for their numbers, where any number will do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ludwig_peft_plugin.estimate.operators import stand_in


class NoData(TorchDispatchMode):
    """While it is active, operations that would need numbers give ones, and copies to the host stay without data.

    Attributes:
        distinct: how many distinct values there are at most where an operation gives those of a tensor.
    """

    distinct = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, nn.Parameter) and _has_own_dispatch(kind) for kind in types):
            return NotImplemented  # a tensor subclass: what it is made of comes here next
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of one operation."""
        result = stand_in(func, args, kwargs, self.distinct)
        return func(*args, **kwargs) if result is None else result


def _has_own_dispatch(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)
