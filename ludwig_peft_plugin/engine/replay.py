"""Run a layer a second time exactly as the first: the same random numbers and the same mixed precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Recomputed(threading.local):
    """The layer whose forward pass this thread repeats; backward passes run in threads of their own."""

    layer: nn.Module | None = None


_recomputed = _Recomputed()


def recomputed_layer() -> nn.Module | None:
    """Return the layer that is being run again for its backward pass only: nobody will read its output.

    So the last operation of such a layer need not be carried out, as long as its own gradient does not depend on it.
    """
    return _recomputed.layer


class RandomState:
    """Where the generators stand that the operations on a device draw from: its own and the host's.

    Reading and setting them concerns the host only, so neither waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = torch.get_rng_state()
        self._generator: Any = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        if self._generator is not None:
            self._seed, self._offset = self._generator.initial_seed(), self._generator.get_offset()

    def differs(self, other: RandomState) -> bool:
        """Return whether numbers were drawn on the same device between `self` and `other`."""
        if self._generator is not None and (self._seed, self._offset) != (other._seed, other._offset):
            return True
        return not torch.equal(self._host, other._host)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self._host)
        if self._generator is not None:
            self._generator.manual_seed(self._seed)
            self._generator.set_offset(self._offset)


class Replay:
    """One forward pass of a layer, to be repeated.

    While a CUDA graph is recorded, the generators' states cannot be read. Layers that draw from them are refused then;
    the fused layers' dropout is drawn from a seed on the device and needs none of this.
    """

    def __init__(self, function: Callable[..., Any], others: tuple[Any, ...]) -> None:
        """Prepare a replay of `function(hidden, *others)`."""
        self._function = function
        self._others = others
        self._random: RandomState | None = None
        self._autocast: tuple[str, bool, torch.dtype] | None = None

    def first(self, hidden: Tensor) -> Any:
        """Run the layer on `hidden` and note what it depended on."""
        device = hidden.device
        kind = device.type
        if torch.amp.autocast_mode.is_autocast_available(kind):
            self._autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._refuse_random_numbers(hidden.dtype)
            return self._function(hidden, *self._others)
        before = RandomState(device)
        outputs = self._function(hidden, *self._others)
        self._random = before if before.differs(RandomState(device)) else None
        return outputs

    def again(self, hidden: Tensor) -> Any:
        """Run the layer on the same `hidden` once more, with gradients; the generators stay where they are."""
        previous, _recomputed.layer = _recomputed.layer, layer_of(self._function)
        try:
            with torch.enable_grad(), self._same_precision(), self._same_random_numbers(hidden.device):
                return self._function(hidden, *self._others)
        finally:
            _recomputed.layer = previous

    @contextmanager
    def _same_random_numbers(self, device: torch.device) -> Iterator[None]:
        if self._random is None:
            yield
            return
        now = RandomState(device)
        self._random.restore()
        try:
            yield
        finally:
            now.restore()

    @contextmanager
    def _same_precision(self) -> Iterator[None]:
        if self._autocast is None or not (self._autocast[1] or torch.is_autocast_enabled(self._autocast[0])):
            yield
            return
        kind, enabled, dtype = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            yield

    def _refuse_random_numbers(self, dtype: torch.dtype) -> None:
        layer = layer_of(self._function)
        if layer is None or draws_random_numbers(layer, dtype):
            name = "a function" if layer is None else type(layer).__name__
            raise RuntimeError(
                f"{name} cannot be recorded as a CUDA graph under gradient checkpointing: its dropout would differ "
                "between the two passes"
            )


def layer_of(function: Any) -> nn.Module | None:
    """Return the layer that a function given to a checkpoint runs, or None where that cannot be known."""
    owner = getattr(getattr(function, "func", function), "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def draws_random_numbers(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a layer in training mode draws from PyTorch's generators, on activations of `dtype`."""
    from ludwig_peft_plugin.engine.fused.layer import FusedForward, obstacle  # which asks for `recomputed_layer`

    rates = [module.p for module in layer.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    for module in layer.modules():
        rates += [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    fused = isinstance(layer.__dict__.get("forward"), FusedForward)
    return any(rates) and not (fused and obstacle(layer, dtype) is None)
