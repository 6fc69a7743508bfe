"""All that can be observed of an adapter, for telling whether an option changed anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def shapes(case: Any, model: Any) -> dict[str, Any]:
    """Return names, shapes and kinds of all tensors of the model: what was added, and what is trained."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in named}


def initial_values(case: Any, model: Any) -> dict[str, Any]:
    """Return the values of all tensors as the adapter starts."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def outputs(case: Any, model: Any) -> dict[str, Any]:
    """Return the logits at the start and with other values of the adapter, and the gradients there."""
    start = case.logits(model)
    case.disturbed(model)
    logits = case.logits(model)
    _, gradients = case.flat_gradients(model)
    return {"start": start, "logits": logits, **gradients}


def training(case: Any, model: Any) -> dict[str, Any]:
    """Return the trained parameters after some steps in training mode."""
    case.run(model).train(range(3))
    return {name: parameter.detach().clone() for name, parameter in case.trained(model).items()}


ASPECTS: tuple[Callable[[Any, Any], dict[str, Any]], ...] = (shapes, initial_values, outputs, training)


class Fingerprint:
    """What was observed of one adapter; later aspects are looked at only when they are asked for."""

    def __init__(self, case: Any, attach: Callable[[], Any]) -> None:
        self._case = case
        self._model = attach()
        self._found: list[dict[str, Any]] = []

    def aspect(self, number: int) -> dict[str, Any]:
        """Return one of `ASPECTS`; they follow one another on the same model."""
        while len(self._found) <= number:
            self._found.append(ASPECTS[len(self._found)](self._case, self._model))
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
