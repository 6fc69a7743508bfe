"""Which storages a model's tensors lie in, and how many bytes the GPU's allocator gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ludwig_peft_plugin.rounding import rounded_up

BLOCK = 512
"""PyTorch's caching allocator hands out multiples of this many bytes."""


def allocated(size: int) -> int:
    """Return the bytes that the allocator takes for a storage of `size` bytes."""
    return rounded_up(size, BLOCK)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage that `tensors` lie in, by an identity that holds while the storage lives."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def allocated_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the allocator takes for the storages of `tensors`, each counted once."""
    return sum(allocated(size) for size in storages(tensors).values())


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold the data: those inside a tensor subclass (torchao), else the tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, str(name)))
    else:
        yield tensor


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers and what quantised weights keep beside them (scales, code books)."""
    yield from own_tensors(model.modules())


def own_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the tensors that belong to the given modules themselves, not to modules in them."""
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield tensor
            yield from _statistics(tensor)
        yield from _of_adapter_layer(module)
        state = getattr(module, "state", None)  # bitsandbytes' 8-bit layers move the scales here when they first run
        if type(state).__module__.startswith("bitsandbytes"):
            yield from _tensors_of(state)


def _of_adapter_layer(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a layer of PEFT has in plain dictionaries, without those on the host of a GPU's layer."""
    device = None
    for attribute in getattr(module, "other_param_names", ()):
        entries = getattr(module, attribute, None)
        for entry in entries.values() if isinstance(entries, dict) else ():
            if isinstance(entry, Tensor):
                device = device or next(module.parameters()).device
                if entry.device == device:
                    yield entry


def _statistics(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors among the attributes of a quantised weight."""
    if type(tensor) in (Tensor, nn.Parameter, torch.nn.Buffer):
        return
    for value in vars(tensor).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _tensors_of(value)


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a bitsandbytes state, and of the one nested in it (double quantisation)."""
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _tensors_of(value)
