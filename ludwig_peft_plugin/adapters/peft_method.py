"""Adapter types that are a method of PEFT: options derived from its config, built on full and quantised bases."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from ludwig_peft_plugin.adapters.base import Batches, register
from ludwig_peft_plugin.adapters.derived import DerivedConfig
from ludwig_peft_plugin.adapters.lora_options import target_modules_option
from ludwig_peft_plugin.adapters.peft_methods import METHODS
from ludwig_peft_plugin.adapters.peft_options import derive, own_fields, with_options
from ludwig_peft_plugin.adapters.shapes import Shapes, shapes_of
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PeftMethod(DerivedConfig):
    """A type whose adapter PEFT builds. A subclass names the method and states what we do otherwise than PEFT.

    Attributes:
        shared_by_name: layers of one name share parameters, so `all-linear` is resolved to names and not to layers.
    """

    quantized_base: ClassVar[bool] = True
    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    shared_by_name: ClassVar[bool] = False

    target_modules: list[str] | str | None = target_modules_option(default="all-linear")

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        problems = []
        targets, layers = self.target_modules, getattr(self, "layers_to_transform", None)
        expression = isinstance(targets, str) and targets.lower() != "all-linear"
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name, None)
            if isinstance(value, str) and (error := _regex_error(value)):
                problems.append(f"{name}: {value!r} is not a regular expression ({error}); use a list for plain names.")
        if expression and layers is not None:
            problems.append(
                "layers_to_transform does not work with a regular expression in target_modules; name the layers in the "
                "expression, or give target_modules as a list or all-linear."
            )
        if getattr(self, "layers_pattern", None) is not None and layers is None:
            problems.append("layers_pattern has no effect without layers_to_transform; add that, or remove it.")
        return problems

    def idle(self, needed: str, *names: str) -> list[str]:
        """Return the problem of each of these options that is not at its default, where `needed` is not given."""
        fields = type(self).model_fields
        given = [name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)]
        return [f"{name} has no effect without {needed}; add that, or remove it." for name in given]

    def architecture_targets(self, model_type: str) -> list[str] | str | None:
        """Return the modules PEFT adapts in an architecture when none are given, None where it has no such list."""
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(self.peft_type)]
        return (getattr(tuner, "target_module_mapping", None) or {}).get(model_type)

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> PeftConfig:
        """Return the PEFT config of these options; `kwargs` replace PEFT arguments and unknown ones are ignored.

        Raises:
            AdapterError: PEFT refuses options that contradict each other.
        """
        known = own_fields(self.peft_config())
        arguments = self.peft_arguments() | {name: value for name, value in kwargs.items() if name in known}
        try:
            return self.peft_config()(**{**arguments, "task_type": task_type})
        except ValueError as error:
            raise AdapterError(f"adapter: {' '.join(str(error).split())}") from error

    def fitted(self, base: PreTrainedModel, shapes: Shapes) -> dict[str, Any]:
        """Return the PEFT arguments that follow from the sizes of the layers, and check those that were given.

        Raises:
            AdapterError: an option does not fit a layer.
        """
        return {}

    @classmethod
    def building(cls) -> AbstractContextManager[None]:
        """Return a context within which PEFT puts the method's layers on a model, new ones or stored ones."""
        return nullcontext()

    @classmethod
    def settle(cls, model: PeftModel) -> None:
        """Put right what PEFT's layers of the method are not after they were put on a model."""

    def build(self, base: PreTrainedModel, batches: Batches | None) -> PeftModel:
        """Put a new adapter on `base`; see `AdapterConfig.build`."""
        from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft
        from ludwig_peft_plugin.adapters.peft_checks import check_options
        from ludwig_peft_plugin.adapters.targets import find_targets

        targets = find_targets(base, self)
        check_options(base, self, targets)
        fitted = self.fitted(base, shapes_of(base, targets.names))
        arguments = {"target_modules": targets.target_modules, **fitted}
        return wrap_with_peft(base, self.to_config(task_type="CAUSAL_LM", **arguments))


def peft_method[T: type[PeftMethod]](name: str, *, replace: bool = False) -> Callable[[T], T]:
    """Return a class decorator that derives a type's options from PEFT and registers it as `type: <name>`.

    Args:
        name: the type's name in a config.
        replace: take the place of Ludwig's own type of that name.
    """

    def decorate(cls: T) -> T:
        options = derive(
            cls.peft_config(),
            renamed=cls.renamed,
            removed=cls.removed,
            defaults=cls.defaults,
            texts=cls.texts,
            values=cls.values,
        )
        METHODS[cls.peft_type] = complete = with_options(cls, name, cls.summary, list(options))
        return register(name, replace=replace)(complete)

    return decorate


def _regex_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
