"""All that can be observed of an adapter, for telling whether an option changed anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.adapters.io import stored_adapter

STEPS, STEPS_WITH_SCHEDULE = 3, 12
"""How long runs are: of types that do nothing beside gradient steps, and of those that act at some of them."""


def shapes(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return names, shapes and kinds of all tensors of the model: what was added, and what is trained."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in named}


def initial_values(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all tensors as the adapter starts."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def outputs(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the logits at the start and with other values of the adapter, and the gradients there."""
    start = case.logits(model)
    case.disturbed(model)
    logits = case.logits(model)
    _, gradients = case.flat_gradients(model)
    return {"start": start, "logits": logits, **gradients}


def stored(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return names, shapes and kinds of what is saved of the adapter."""
    state = {} if case.trains_base else stored_adapter(model).state
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def products(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return in which number format the trainer has a type compute that leaves it to the trainer, by device."""
    chosen = getattr(case.section(**options), "computes_in_bfloat16", lambda device, precision: None)
    with mock.patch("torch.cuda.is_bf16_supported", return_value=True):
        return {name: chosen(torch.device(name), "auto") for name in ("cpu", "cuda")}


def training(case: Any, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the trained parameters after some steps in training mode, with what the type does beside them."""
    acts = getattr(case.cls, "step_hooks", AdapterConfig.step_hooks) is not AdapterConfig.step_hooks
    case.run(model, **options).train(range(STEPS_WITH_SCHEDULE if acts else STEPS))
    return {name: parameter.detach().clone() for name, parameter in case.trained(model).items()}


ASPECTS: tuple[Callable[[Any, Any, dict[str, Any]], dict[str, Any]], ...] = (
    shapes,
    initial_values,
    stored,
    products,
    outputs,
    training,
)


class Fingerprint:
    """What was observed of an adapter with some options; later aspects are looked at only when they are asked for."""

    def __init__(self, case: Any, options: dict[str, Any]) -> None:
        self._case, self._options = case, options
        self._model = case.attach(**options)
        self._found: list[dict[str, Any]] = []

    def aspect(self, number: int) -> dict[str, Any]:
        """Return one of `ASPECTS`; they follow one another on the same model."""
        while len(self._found) <= number:
            self._found.append(ASPECTS[len(self._found)](self._case, self._model, self._options))
        return self._found[number]

    def difference(self, other: Fingerprint) -> str | None:
        """Return where two adapters differ first, None when they are the same throughout."""
        for number, aspect in enumerate(ASPECTS):
            mine, theirs = self.aspect(number), other.aspect(number)
            if mine.keys() != theirs.keys() or any(not _same(mine[name], theirs[name]) for name in mine):
                return aspect.__name__
        return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)
