"""PEFT configs of the selective tuners: what is chosen, and how the choice turns into names of parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType
from torch import nn

from ludwig_peft_plugin.adapters.selective.base_model import (
    base_modules,
    base_parameters,
    is_bias,
    is_norm,
    is_quantized_parameter,
    layer_list,
    output_head,
    targeted,
)
from ludwig_peft_plugin.adapters.targets import LINEAR
from ludwig_peft_plugin.errors import AdapterError

logger = logging.getLogger(__name__)


@dataclass
class SelectiveConfig(PeftConfig):
    """What the tuners here have in common.

    Attributes:
        parameter_names: full names of the trained parameters in the base, filled in when a model is there to choose
            from. A saved adapter has them, so that it fits the base it was made for, whatever rule chose them.
    """

    parameter_names: list[str] | None = field(
        default=None, metadata={"help": "Full names of the trained parameters. None has them chosen from the model."}
    )

    target_modules: ClassVar[None] = None  # which PEFT asks every config for

    def resolve(self, base: nn.Module) -> None:
        """Fill in `parameter_names` for a base.

        Raises:
            AdapterError: the choice is empty on this base, or one of weights that cannot be trained.
        """
        if self.parameter_names is None:
            self.parameter_names = self.choose(base)

    def choose(self, base: nn.Module) -> list[str]:
        """Return the full names of the parameters to train."""
        raise NotImplementedError


@dataclass
class BitFitConfig(SelectiveConfig):
    """Biases.

    Attributes:
        bias_modules: the modules whose biases are trained: names or ends of names, or an expression; None for all.
        create: whether linear layers without a bias get one, which starts at zero.
    """

    bias_modules: list[str] | str | None = None
    create: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["BITFIT"]

    def choose(self, base: nn.Module) -> list[str]:
        """Return the names of the biases, and of those to be made."""
        head = output_head(base)
        biases, modules = [], []
        for name, module in base_modules(base):
            if not targeted(name, self.bias_modules):
                continue
            modules.append(name)
            own = [key for key, value in module._parameters.items() if value is not None and is_bias(key)]
            if self.create and not own and isinstance(module, LINEAR) and module is not head:
                own = ["bias"]
            biases += [f"{name}.{key}" for key in own]
        for wanted in self.bias_modules if isinstance(self.bias_modules, list) else [self.bias_modules]:
            if wanted is not None and not any(targeted(name, _rule(wanted, self.bias_modules)) for name in modules):
                raise AdapterError(f"adapter.target_modules: {wanted!r} matches no module; {_examples(base)}")
        if not biases:
            where = "the modules of adapter.target_modules have" if self.bias_modules else f"{_kind(base)} has"
            raise AdapterError(
                f"adapter.type: bitfit has nothing to train: {where} no biases. Set adapter.create: true (linear "
                "layers get a bias that starts at zero), use type ln_tuning, ia3 or lora, or a base that has biases, "
                "as Qwen2 and GPT-2."
            )
        return biases


@dataclass
class SelectedLayersConfig(SelectiveConfig):
    """All weights of some layers, or the parameters an expression matches.

    Attributes:
        first: how many layers from the input on.
        last: how many layers up to the output.
        layer_range: [first layer, end]: layers from 0, the end is past the last one.
        pattern: regular expression over full parameter names, instead of layers.
        include_head: whether the output head is trained too.
    """

    first: int | None = None
    last: int | None = None
    layer_range: list[int] | None = None
    pattern: str | None = None
    include_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LAYERS"]

    def choose(self, base: nn.Module) -> list[str]:
        """Return the names of the chosen parameters; of one that is shared (tied embeddings), all its names."""
        parameters = list(base_parameters(base))
        names = self._by_pattern(base) if self.pattern is not None else self._by_layer(base)
        chosen = {id(parameter) for name, _, _, parameter in parameters if name in names}
        tied = [name for name, _, _, parameter in parameters if id(parameter) in chosen and name not in names]
        if tied:
            logger.info("adapter: %s is the same weight as one that is trained, so it is trained too.", ", ".join(tied))
        for name, module, own_name, parameter in parameters:
            if id(parameter) in chosen and is_quantized_parameter(module, own_name, parameter):
                raise AdapterError(
                    f"adapter.type: layers cannot train {name!r}: it is quantised, and the steps between the numbers "
                    "it can hold are far larger than those of training. Remove the quantization section, choose "
                    "parameters that are not quantised (pattern: lm_head.weight), or use type qlora."
                )
        return [name for name, _, _, parameter in parameters if id(parameter) in chosen]

    def _by_pattern(self, base: nn.Module) -> set[str]:
        every = [name for name, _, _, _ in base_parameters(base)]
        names = {name for name in every if targeted(name, self.pattern)}
        if not names:
            raise AdapterError(
                f"adapter.pattern: {self.pattern!r} matches no full parameter name. Examples are {every[0]!r} and "
                f"{every[len(every) // 2]!r}; `.*` stands for any part of a name."
            )
        return names

    def _by_layer(self, base: nn.Module) -> set[str]:
        found = layer_list(base)
        if found is None:
            raise AdapterError("adapter.type: layers finds no list of layers in this model; use pattern.")
        prefix, layers = found
        count = len(layers)
        for option, most in (("first", self.first), ("last", self.last), ("range", (self.layer_range or [0, 0])[1])):
            if most is not None and most > count:
                raise AdapterError(f"adapter.{option}: {most} is more than the model has: {count} layers.")
        start, end = self.layer_range or ((0, self.first) if self.first else (count - (self.last or 0), count))
        inside = tuple(f"{prefix}.{number}." for number in range(start, end or 0))
        names = {name for name, _, _, _ in base_parameters(base) if name.startswith(inside)}
        if self.include_head:
            head = output_head(base)
            if head is None:
                raise AdapterError("adapter.include_head: this model has no output head; remove the option.")
            names |= {name for name, module, _, _ in base_parameters(base) if module is head}
        return names


def norm_names(base: nn.Module) -> list[str]:
    """Return the full names of the normalisations with weights.

    Raises:
        AdapterError: there are none.
    """
    names = [name for name, module in base_modules(base) if is_norm(module)]
    if not names:
        raise AdapterError(
            f"adapter.type: ln_tuning has nothing to train: {_kind(base)} has no normalisation with weights. Use type "
            "lora, or layers with a pattern."
        )
    return names


def _rule(entry: str, wanted: Any) -> list[str] | str:
    return entry if isinstance(wanted, str) else [entry]


def _kind(base: Any) -> str:
    return f"this model ({getattr(getattr(base, 'config', None), 'model_type', type(base).__name__)})"


def _examples(base: nn.Module) -> str:
    leaves = sorted({name.rsplit(".", 1)[-1] for name, module in base_modules(base) if isinstance(module, LINEAR)})
    return f"its linear modules are {', '.join(leaves)}."
