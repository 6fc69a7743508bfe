"""Choose which of a model's adapters answer: for good, or for the length of a `with` block, the base left loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

BASE = "base"
"""The name under which the base without any adapter can be asked for; no adapter can be called so."""

_choice: ContextVar[str | None] = ContextVar("ludwig_peft_plugin_adapter", default=None)


@contextmanager
def choose_adapter(name: str | None) -> Iterator[None]:
    """Let the named adapter answer in every prediction and evaluation of Ludwig's inside a `with` block."""
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def chosen_adapter() -> str | None:
    """Return the adapter that `choose_adapter` has named, None where the active one answers."""
    return _choice.get()


def peft_model_of(model: Any) -> PeftModel:
    """Return the PEFT model inside a `LudwigModel`, a `PeftLLM` or itself.

    Raises:
        AdapterError: there is none, because the model has no adapter, or it was merged.
    """
    from peft import PeftModel

    found = model
    while found is not None and not isinstance(found, PeftModel):
        found = getattr(found, "model", None)
    if found is None:
        raise AdapterError("This model has no adapter that could be chosen: it has none, or it was merged.")
    return found


def adapter_names(model: Any) -> list[str]:
    """Return the names of a model's adapters."""
    return list(peft_model_of(model).peft_config)


def active_names(model: Any) -> list[str]:
    """Return the names of the adapters that answer, none where they are switched off."""
    peft_model = peft_model_of(model)
    return [] if peft_model._adapters_disabled else list(peft_model.active_adapters)


def set_adapter(model: Any, names: str | Sequence[str], *, trained: Collection[str] | None = None) -> None:
    """Let the named adapter answer from now on, or several at once, whose effects add up.

    Args:
        model: a `LudwigModel`, `PeftLLM` or PEFT model.
        names: the adapter or adapters.
        trained: which of them training changes; None for all, or none where nothing is trained now.

    Raises:
        AdapterError: there is no such adapter, or the method allows only one at a time.
    """
    peft_model = peft_model_of(model)
    chosen = [names] if isinstance(names, str) else list(names)
    known = list(peft_model.peft_config)
    if unknown := [name for name in chosen if name not in known]:
        raise AdapterError(f"adapter {unknown[0]!r}: the model has no adapter of this name. It has {', '.join(known)}.")
    if not chosen:
        raise AdapterError(f"No adapter is named. Give one of {', '.join(known)}.")
    if trained is None:
        trains = any(parameter.requires_grad for parameter in peft_model.parameters())
        trained = chosen if trains else ()
    if peft_model.peft_config[chosen[0]].is_prompt_learning or not hasattr(peft_model.base_model, "active_adapters"):
        if len(chosen) > 1:
            kind = peft_model.peft_config[chosen[0]].peft_type.value.lower()
            raise AdapterError(f"adapters {', '.join(chosen)}: only one {kind} adapter can be active at a time.")
        peft_model.set_adapter(chosen[0], inference_mode=not trained)
        for name in known:
            _require_gradients(peft_model, name, name in chosen and name in trained)
        return
    peft_model.set_adapter(chosen[0], inference_mode=not trained)
    if len(chosen) > 1:
        # PEFT's own method takes one name; what it leaves to its layers takes several.
        peft_model.base_model.set_adapter(chosen, inference_mode=not trained)
    for name in chosen:
        if name not in trained:
            _require_gradients(peft_model, name, False)


def _require_gradients(peft_model: PeftModel, name: str, wanted: bool) -> None:
    for parameter in parameters_of(peft_model, name):
        parameter.requires_grad_(wanted)


@contextmanager
def use_adapter(model: Any, names: str | Sequence[str] | None) -> Iterator[None]:
    """Let other adapters answer inside a `with` block; afterwards everything is as before.

    Args:
        model: a `LudwigModel`, `PeftLLM` or PEFT model.
        names: the adapter, several whose effects add up, or None (or "base") for the base alone.

    Raises:
        AdapterError: there is no such adapter.
    """
    peft_model = peft_model_of(model)
    before = list(peft_model.active_adapters)
    gradients = {parameter: parameter.requires_grad for parameter in peft_model.parameters()}
    try:
        if names is None or names == BASE:
            with peft_model.disable_adapter():
                yield
        else:
            set_adapter(peft_model, names, trained=())
            yield
    finally:
        if active_names(peft_model) != before:
            set_adapter(peft_model, before, trained=())
        for parameter, wanted in gradients.items():
            parameter.requires_grad_(wanted)


def parameters_of(model: PeftModel, name: str) -> list[nn.Parameter]:
    """Return the floating-point parameters that belong to one of a model's named adapters."""
    return [
        parameter
        for path, parameter in model.named_parameters()
        if name in path.split(".") and parameter.is_floating_point()
    ]
