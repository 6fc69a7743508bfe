"""Let a model on the meta device take the paths it takes on a GPU.

Code that asks whether a tensor is on a GPU gets "no" from a meta tensor and turns to a slower path that needs other
memory. Within `gpu_view` the answer is "yes": the engine's kernels are called, make their results, and are not
launched; flash attention and the fused forms of PyTorch's own functions are taken.

The functions themselves are replaced for the time, since PyTorch's modes for that are off in backward passes, where
checkpointed layers run again. Other tensors than meta ones are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.estimate.autocast import autocast_view
from ludwig_peft_plugin.estimate.replace import replaced

Functions = dict[str, Any]


@contextmanager
def gpu_view(autocast: torch.dtype | None = None) -> Iterator[None]:
    """Within the context, meta tensors are treated as tensors on a GPU with bfloat16 and float8 units.

    Args:
        autocast: the dtype of `torch.autocast`, which does not know meta tensors; None for none.
    """
    with ExitStack() as stack:
        for module, answers in _ANSWERS.items():
            stack.enter_context(replaced(import_module(module), answers))
        stack.enter_context(replaced(F, {name: _on_meta(getattr(F, name), fused) for name, fused in _FUSED.items()}))
        if find_spec("triton") is not None:  # otherwise PyTorch's counterparts of the kernels run, with more workspace
            stack.enter_context(_kernels())
        if autocast is not None:
            stack.enter_context(autocast_view(autocast))
        yield


def _on_meta(original: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `fused` for meta tensors and `original` for others."""

    def chosen(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = fused if tensor.device.type == "meta" else original
        return function(tensor, *args, **kwargs)

    return chosen


def _in_16_bits(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _needs_own_heads(query: Tensor) -> bool:
    return not _in_16_bits(query)


def _yes(*_: Any) -> bool:
    return True


def _no(*_: Any) -> bool:
    return False


_ANSWERS: dict[str, Functions] = {
    "ludwig_peft_plugin.engine.attention": {
        "has_16_bit_kernels": _in_16_bits,
        "needs_own_heads": _needs_own_heads,
    },
    # A recorded graph holds what the passes it was recorded from held.
    "ludwig_peft_plugin.engine.graphs": {"can_be_graphed": _no},
    "ludwig_peft_plugin.model.float8": {"has_float8_units": _yes},
    "ludwig_peft_plugin.model.float8_arithmetic": {"has_float8_units": _yes},
}
"""Questions about the GPU, by the module that asks them, with the answers of a recent one."""


@contextmanager
def _kernels() -> Iterator[None]:
    """Call Triton kernels' wrappers for meta tensors, and launch nothing: there is nothing to compute."""
    from triton.runtime.jit import KernelInterface

    launch = KernelInterface.__getitem__

    def no_launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            if any(isinstance(arg, Tensor) and arg.device.type != "meta" for arg in args):
                launch(kernel, grid)(*args, **kwargs)

        return run

    on_gpu = property(lambda tensor: tensor.device.type in ("cuda", "meta"))
    with replaced(KernelInterface, {"__getitem__": no_launch}), replaced(Tensor, {"is_cuda": on_gpu}):
        yield


class _FlashAttention(torch.autograd.Function):
    """The memory of flash attention on tensors (B, heads, L, d): no (L, L) scores, float32 sums in the backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        output = query.new_empty((rows, length, heads, value.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        sums = query.new_empty(query.shape, dtype=torch.float32)
        expanded = [query.new_empty(query.shape) for _ in range(2)] if key.shape[1] != query.shape[1] else []
        result = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del sums, expanded
        return result


_plain_attention = F.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
    if key.shape[1] != query.shape[1] and _needs_own_heads(query):  # no kernel: PyTorch's formula, with its scores
        return _plain_attention(query, key, value, *others, **named)
    output: Tensor = _FlashAttention.apply(query, key, value)
    return output


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    output: Tensor = torch.ops.aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
    return output


_FUSED: Functions = {"scaled_dot_product_attention": _attention, "dropout": _dropout, "rms_norm": _rms_norm}
"""Functions of `torch.nn.functional` that are one operation on a GPU and several elsewhere."""
