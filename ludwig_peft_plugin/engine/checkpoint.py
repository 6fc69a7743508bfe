"""Activation checkpointing: of a decoder layer only the input is kept, and the backward pass runs the layer again.

Memory for activations falls from all layers' to one layer's and an input for each (Chen et al., 2016,
https://arxiv.org/abs/1604.06174), for one more forward pass. Unlike PyTorch's own function this one needs no hooks on
saved tensors, no input that requires gradients and no copies of generator states on the device, so that it costs the
host little time and can be recorded in a CUDA graph.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.offload import CudaCopyQueue, HostStore
from ludwig_peft_plugin.engine.replay import Replay, layer_of
from ludwig_peft_plugin.errors import ModelError

logger = logging.getLogger(__name__)


def enable_checkpointing(model: Any, *, layers: float = 1.0, offload: bool = False) -> None:
    """Checkpoint the decoder layers of a model in training mode, from its next forward pass on.

    Args:
        model: a transformers model, with or without PEFT around it; adapters may be attached later.
        layers: the share of the layers, counted from the first, in (0, 1]. The last ones are left out because their
            activations live shortest: the backward pass frees them before it runs the first layer again.
        offload: keep the layers' inputs in page-locked host memory.

    Raises:
        ModelError: the model's layers cannot be checkpointed as asked.
    """
    base = unwrapped(model)
    device = next(base.parameters()).device
    if offload and device.type != "cuda":
        raise ModelError(
            f"trainer.checkpoint_offload: the model is on the device {device.type!r}; only for a GPU is the host's "
            "memory another one. Remove the option."
        )
    install(base, layers, HostStore(CudaCopyQueue(device)) if offload else None)


def install(base: Any, layers: float, store: HostStore | None) -> None:
    """Hand our checkpoint to the first `layers` of a transformers model, with its inputs in `store` if there is one."""
    if not 0 < layers <= 1:
        raise ModelError(
            f"trainer.checkpoint_layers: {layers} is no share of the layers. Use a number above 0 and up to 1, or "
            "enable_gradient_checkpointing: false."
        )
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"trainer.enable_gradient_checkpointing: {type(base).__name__} cannot be checkpointed. Remove the option."
        )
    found = checkpointable_layers(base)
    if not found:
        _install_into_other_code(base, layers, store)
        return
    base._set_gradient_checkpointing(True, gradient_checkpointing_func=LayerCheckpoint(store))
    count = max(1, round(layers * len(found)))
    chosen = {id(layer) for layer in found[:count]}
    for layer in _asking_layers(base).values():
        layer.gradient_checkpointing = id(layer) in chosen
    found[count - 1]._gradient_checkpointing_func = LayerCheckpoint(store, first_back=True)
    place = " in host memory" if store else ""
    logger.info("Gradient checkpointing: %d of %d layers, their inputs kept%s.", count, len(found), place)


def checkpointable_layers(base: nn.Module) -> list[Any]:
    """Return the layers that ask for a checkpoint themselves, in order; none that lies within another."""
    found = _asking_layers(base)
    within = {name for name in found if any(name.startswith(f"{other}.") for other in found)}
    return [module for name, module in found.items() if name not in within]


def _asking_layers(base: nn.Module) -> dict[str, Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {name: module for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def _install_into_other_code(base: Any, layers: float, store: HostStore | None) -> None:
    """Checkpoint a model whose code is not transformers' own and calls the checkpoint from its loop over layers."""
    if layers != 1 or store is not None:
        option = "checkpoint_layers" if layers != 1 else "checkpoint_offload"
        raise ModelError(
            f"trainer.{option}: {type(base).__name__} is not made of transformers' own layers. Remove the option; "
            "enable_gradient_checkpointing works without it."
        )
    if "value" in inspect.signature(base._set_gradient_checkpointing).parameters:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base._set_gradient_checkpointing(True, gradient_checkpointing_func=LayerCheckpoint(None))


class LayerCheckpoint:
    """What a transformers model calls instead of a layer: `checkpoint(function, hidden_states, ...)`."""

    can_be_captured = True  # read by graphs.py

    def __init__(self, store: HostStore | None, *, first_back: bool = False) -> None:
        """Make a checkpoint for layers.

        Args:
            store: where their inputs are kept; None keeps them on the device.
            first_back: it is the last of the layers, whose input is needed at once in the backward pass, so that it
                stays on the device.
        """
        self._store = store
        self._first_back = first_back
        self._warned = False

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run `function(*arguments)`, keeping its first argument alone for the backward pass."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        if torch.compiler.is_compiling():  # with the whole model, whose compiler knows PyTorch's own function
            return checkpoint(function, *arguments, use_reentrant=False)
        if not _only_first_can_need_gradients(function, arguments):
            self._warn(function)
            return checkpoint(function, *arguments, use_reentrant=False)
        hidden, *others = arguments
        anchor = None
        if not hidden.requires_grad:
            layer = layer_of(function)
            if layer is not None and not any(parameter.requires_grad for parameter in layer.parameters()):
                return function(*arguments)
            anchor = torch.empty(0, requires_grad=True)  # autograd records nothing unless an input requires gradients
        return _Checkpointed.apply(hidden, anchor, Replay(function, tuple(others)), self._store, self._first_back)

    def _warn(self, function: Any) -> None:
        """Say once where an option has no effect."""
        if self._store is not None and not self._warned:
            self._warned = True
            layer = layer_of(function)
            name = "Some layers" if layer is None else f"Layers of {type(layer).__name__}"
            logger.warning("trainer.checkpoint_offload: %s pass more than one state on; theirs stay on the GPU.", name)


class _Checkpointed(torch.autograd.Function):
    """hidden -> the layer's outputs; gradients of the layer's parameters go straight to their `grad`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, anchor: Tensor | None, replay: Replay, store: HostStore | None, first_back: bool
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.replay = replay
        ctx.kept = None if store is None else store.keep(hidden, on_device=first_back)
        if store is None:
            ctx.save_for_backward(hidden)
        version = hidden._version
        outputs = replay.first(hidden)
        if hidden._version != version:
            raise RuntimeError("a layer that changes its input in place cannot be checkpointed")
        if ctx.kept is not None:
            ctx.kept.settle()
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "a checkpointed model's gradients come from backward() without `inputs`, not from autograd.grad()"
            )
        hidden: Tensor = ctx.saved_tensors[0] if ctx.kept is None else ctx.kept.take()
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        edges, upstream = _roots(ctx.replay.again(hidden), grads)
        if edges:
            torch.autograd.backward(edges, upstream)
        return hidden.grad, None, None, None, None


def _roots(outputs: Any, grads: tuple[Tensor | None, ...]) -> tuple[list[GradientEdge], list[Tensor]]:
    """Return where the layer's graph begins and the gradients there: its outputs themselves are not needed any more."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    edges, upstream = [], []
    for output, grad in zip(outputs, grads, strict=True):
        if grad is not None and output.requires_grad:
            edges.append(get_gradient_edge(output))
            upstream.append(grad)
    return edges, upstream


def _only_first_can_need_gradients(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether gradients can flow through nothing but the first argument.

    Layers that hand states to later layers in some container would lose the gradients of these.
    """
    if not arguments or not isinstance(arguments[0], Tensor):
        return False
    named = getattr(function, "keywords", {})
    return all(map(_constant, arguments[1:])) and all(map(_constant, named.values()))


def _constant(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad
    if isinstance(value, (tuple, list)):
        return all(map(_constant, value))
    return isinstance(value, (NoneType, bool, int, float, str, torch.dtype, torch.device))
