"""What an optimiser keeps for each parameter, from the optimiser itself: one step of it on the meta device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.estimate import tracker as parts
from ludwig_peft_plugin.estimate.storage import BLOCK, allocated_bytes
from ludwig_peft_plugin.estimate.tracker import MemoryTracker
from ludwig_peft_plugin.training.optimizers import parameters_on

PAGED_FROM = 100_000
"""bitsandbytes' paged optimisers keep the state of parameters of at least this many numbers in managed memory."""


@dataclass(frozen=True)
class OptimiserMemory:
    """The memory of an optimiser.

    Attributes:
        state: bytes it keeps on the GPU.
        paged: bytes in managed memory, which moves to the host when the GPU is full and which PyTorch does not count.
        step: bytes it takes while it steps, beside state and gradients.
    """

    state: int
    paged: int
    step: int


def optimiser_memory(config: Any, parameters: Iterable[nn.Parameter]) -> OptimiserMemory:
    """Return the memory of an optimiser after its first step.

    Args:
        config: the optimiser section of a config (`trainer.optimizer`).
        parameters: the trained parameters, on the meta device.

    Raises:
        ModelError: the optimiser is not installed, or cannot be asked.
    """
    from ludwig.modules import optimization_modules  # the plugin replaces the function, so it is looked up at the call

    stand_ins = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    with parameters_on("cuda"):
        kind, arguments = optimization_modules.get_optimizer_class_and_kwargs(config, 1e-4)
    fused = bool(arguments.pop("fused", False))  # the fused step takes no memory, and refuses the meta device
    if not fused and arguments.get("foreach", None) is None and "foreach" in inspect.signature(kind).parameters:
        arguments["foreach"] = True  # PyTorch's choice on a GPU
    optimiser: Any = kind(stand_ins, **arguments)
    for parameter in stand_ins:
        parameter.grad = torch.empty_like(parameter)
    if kind.__module__.startswith("bitsandbytes"):
        return _bitsandbytes_memory(optimiser)
    resident = [tensor for parameter in stand_ins for tensor in (parameter.data, parameter.grad) if tensor is not None]
    tracker = MemoryTracker(resident)
    tracker.phase = parts.OPTIMISER
    try:
        with tracker, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimiser.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"trainer.optimizer.type: the memory of {config.type} cannot be estimated ({str(error).splitlines()[0]}); "
            "estimate with adamw, whose state is 8 bytes a parameter."
        ) from error
    state = allocated_bytes(_on_meta(optimiser))
    if fused:  # it counts the steps of each parameter on the GPU
        return OptimiserMemory(state + BLOCK * len(stand_ins), 0, 0)
    return OptimiserMemory(state, 0, max(0, tracker.peak - state))


def _bitsandbytes_memory(optimiser: Any) -> OptimiserMemory:
    """Their kernels change state and weights in place; only the state has to be made."""
    paged = 0

    def buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal paged
        made = torch.zeros_like(parameter, dtype=dtype)
        if optimiser.is_paged and parameter.numel() >= PAGED_FROM:
            paged += made.nbytes
            return made[:0].clone()
        return made

    optimiser.get_state_buffer = buffer
    for number, group in enumerate(optimiser.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimiser.init_state(group, parameter, number, index)
    return OptimiserMemory(allocated_bytes(_on_meta(optimiser)), paged, 0)


def _on_meta(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Return the state that would lie on the GPU; step counts of PyTorch's optimisers stay on the host."""
    leaves = tree_leaves([dict(state) for state in optimiser.state.values()])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "meta"]
