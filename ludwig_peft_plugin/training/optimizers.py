"""Fit Ludwig's optimiser options to the optimisers that are installed, and choose their fast kernels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from ludwig.error import ConfigValidationError

WITH_FUSED_KERNEL = (torch.optim.Adam, torch.optim.AdamW)
OTHER_KERNELS = {"fused", "foreach", "capturable", "differentiable"}  # arguments that choose one

_device: ContextVar[torch.device | None] = ContextVar("optimizer_device", default=None)


@contextmanager
def parameters_on(device: torch.device | str) -> Iterator[None]:
    """Make Ludwig create optimisers for parameters on `device`, which it does not pass on."""
    token = _device.set(torch.device(device))
    try:
        yield
    finally:
        _device.reset(token)


def supported_arguments(optimizer: type[Any], arguments: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the arguments `optimizer` takes; the rest must be at Ludwig's defaults, which ask for nothing.

    bitsandbytes has dropped `block_wise` (its 8-bit optimisers always are) and `percentile_clipping`. On a GPU (see
    `parameters_on`) Adam and AdamW update all parameters in a few kernels, `fused`, unless `arguments` say otherwise.

    Raises:
        ConfigValidationError: an option was set that the installed optimiser no longer has.
    """
    device = _device.get()
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu and optimizer in WITH_FUSED_KERNEL and not OTHER_KERNELS & arguments.keys():
        arguments = {**arguments, "fused": True}
    known = inspect.signature(optimizer).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return arguments
    defaults = type(config).model_fields
    for name in arguments.keys() - known.keys():
        if arguments[name] != defaults[name].default:
            raise ConfigValidationError(
                f"trainer.optimizer.{name}: the installed {config.type} has no such option; remove it."
            )
    return {name: value for name, value in arguments.items() if name in known}
