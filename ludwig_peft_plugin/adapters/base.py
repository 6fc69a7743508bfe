"""What an adapter is for the plugin: the base class of adapter configs, and the one door through which all register."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import BaseAdapterConfig, adapter_registry

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.adapters.step_hooks import StepHooks

Batches = Callable[[], Iterable[dict[str, "torch.Tensor"]]]
"""Yields batches of `input_ids`, `attention_mask`, `labels` (-100 off the target), each LongTensor[rows, length]."""

FAMILIES = ("reparameterisation", "additive", "soft prompt", "scaling", "selective")
"""Kinds of methods: a change of weights, new layers, virtual tokens, scaled activations, chosen weights of the base."""

ADAPTER_NAME = "default"
"""The name under which PEFT keeps the adapter of a model that has one."""


class AdapterConfig(BaseAdapterConfig):
    """Options of one adapter type and how it is put on a model. A subclass is one file, registered by one line.

    What a type can do is data on its class, and is asked there, never by comparing type names.

    Attributes:
        family: which kind of method it is, one of `FAMILIES`.
        paper: authors, year and address of the paper, as "Hu et al. 2021, https://arxiv.org/abs/2106.09685".
        good_for: when to choose it, in a phrase.
        learning_rate: the `trainer.learning_rate` of a config that gives none; None leaves Ludwig's.
        starts_as_base: the adapted model starts as the base, exactly (up to rounding).
        encoder: can be put on text encoders of `model_type: ecd` too.
        several: several adapters of the type can share one base.
        quantized_base: works on a base quantised to 4 or 8 bits.
        quantized_reason: why it does not, to complete "cannot be trained on a quantised base, because".
        torchao_base: works on one with `quantization.backend: torchao`, whose layers multiply by themselves and hold a
            weight in 8 bits; None for where `quantized_base` says so.
        mergeable: can be merged into the base's weights (see `merge_obstacle` for what options change).
        soft_prompt: adds virtual tokens instead of changing layers.
        trains_base: trains the base itself and adds nothing to it; `build` then returns the base.
        default_quantization: the `quantization` section the type brings when the config has none, else None.
        aliases: other spellings of the type's name.
        peft_module: the module whose import makes PEFT know the type, None for PEFT's own types.
    """

    family: ClassVar[str] = "reparameterisation"
    paper: ClassVar[str] = ""
    good_for: ClassVar[str] = ""
    learning_rate: ClassVar[float | None] = None
    starts_as_base: ClassVar[bool] = True
    encoder: ClassVar[bool] = False
    several: ClassVar[bool] = False
    quantized_base: ClassVar[bool] = False
    quantized_reason: ClassVar[str] = ""
    torchao_base: ClassVar[bool | None] = None
    mergeable: ClassVar[bool] = False
    soft_prompt: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    default_quantization: ClassVar[dict[str, Any] | None] = None
    aliases: ClassVar[tuple[str, ...]] = ()
    peft_module: ClassVar[str | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Give inherited options back their descriptions, bounds and checks.

        The metaclass of Ludwig's configs offers a field's default as a class attribute, which pydantic takes for a new
        default in the subclass, and drops everything else that was said about the field.
        """
        super().__pydantic_init_subclass__(**kwargs)
        inherited = [name for name in cls.model_fields if name not in vars(cls).get("__annotations__", {})]
        for name in inherited:
            owners: list[Any] = [base for base in cls.__mro__[1:] if name in getattr(base, "model_fields", {})]
            cls.model_fields[name] = copy.copy(owners[0].model_fields[name])
        if inherited:
            cls.model_rebuild(force=True)

    @property
    def needs_data(self) -> bool:
        """Whether `build` reads training batches."""
        return False

    @property
    def context_tokens(self) -> int:
        """How many tokens of the model's context the adapter takes up, in front of every row."""
        return 0

    @abstractmethod
    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftConfig":
        """Return the PEFT config of these options; `kwargs` replace PEFT arguments and unknown ones are ignored."""

    def build(self, base: "PreTrainedModel", batches: Batches | None) -> "PeftModel":
        """Put a new adapter on `base`, in place, and return the wrapped model.

        Raises:
            AdapterError: an option cannot take effect on this base.
        """
        from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft

        return wrap_with_peft(base, self.to_config(task_type="CAUSAL_LM"))

    def start_plainly(self) -> None:
        """Start from now on without data and without the base's numbers.

        Weights have the sizes they would have; where these depend on numbers, the largest they could have.
        """

    @classmethod
    def without_data(cls) -> AbstractContextManager[None]:
        """Return a context within which adapters of the type are put on a base on the meta device, and run there.

        For what asks tensors for numbers, which those on the meta device do not have.
        """
        return nullcontext()

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return why this adapter could not be merged into `base`, None if it can."""
        return None if self.mergeable else f"adapter.type: {self.type} cannot be merged into the base model."

    def step_hooks(self, model: "PeftModel", total_steps: int) -> "StepHooks | None":
        """Return what the trainer calls in each of `total_steps` optimiser steps, None for nothing.

        Raises:
            AdapterError: the options do not fit a run of this length.
        """
        return None

    def sharing_obstacle(self) -> str | None:
        """Return why this adapter cannot be on one base with others, None if it can."""
        return None if self.several else f"adapter type `{self.type}` cannot share a base with others; train it alone"


def register[T: type[BaseAdapterConfig]](name: str, *, replace: bool = False) -> Callable[[T], T]:
    """Return a class decorator that makes `adapter: {type: <name>}` (and the class's aliases) resolve to the class.

    Args:
        name: the type's name in a config, in lower case.
        replace: take the place of the type of that name, which must exist (the plugin does so for Ludwig's `lora`).

    Raises:
        ConfigValidationError: the name or an alias is taken, is not lower case, or there is nothing to replace.
    """

    def decorate(cls: T) -> T:
        for spelling in (name, *getattr(cls, "aliases", ())):
            _check_free(spelling, cls, replace=replace and spelling == name)
        adapter_registry[name] = cls
        return cls

    return decorate


def _check_free(name: str, cls: type, *, replace: bool) -> None:
    """Raise unless `cls` may be registered under `name`. Registering the same class again is no conflict."""
    if name != name.lower():
        raise ConfigValidationError(f"adapter type {name!r}: names must be lower case, use {name.lower()!r}.")
    owners = (other for key, other in adapter_registry.items() if name in (key, *getattr(other, "aliases", ())))
    owner = next(owners, None)
    if replace:
        if name not in adapter_registry:
            raise ConfigValidationError(f"adapter type {name!r}: replace=True, but no such type is registered.")
        return
    if owner is not None and _path(owner) != _path(cls):
        raise ConfigValidationError(
            f"adapter type {name!r}: {_path(cls)} cannot take the name, it belongs to {_path(owner)}. "
            "Choose another name, or register with replace=True to take its place."
        )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
