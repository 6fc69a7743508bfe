"""The options of an adapter type, derived from the fields of the PEFT config that the type makes.

Nothing is listed by hand but what we say otherwise: a field that a new PEFT release adds to a method is an option of
the type at once, with PEFT's default, its type checked and its help as the description.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ludwig.schema import utils as schema_utils
from peft import PeftConfig

from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.peft_schema import UnknownKindError, Values, values_of

LONGEST_HELP = 240
"""Characters of PEFT's help that are shown where we have no description of our own."""

BOOKKEEPING: dict[str, str] = {
    "task_type": "set by the plugin: the adapters here are for causal language models",
    "peft_type": "set by PEFT",
    "auto_mapping": "bookkeeping of PEFT for models without a task type",
    "peft_version": "bookkeeping of PEFT",
    "base_model_name_or_path": "written when the adapter is saved: the base_model of the config",
    "revision": "Ludwig has no option for the base model's revision",
    "inference_mode": "set by the plugin: trainable while training, frozen otherwise",
    "fan_in_fan_out": "PEFT reads it off the layer type (Conv1D: true, Linear: false) and overrides any other value",
    "megatron_config": "for layers of Megatron-LM, which Ludwig does not load",
    "megatron_core": "for layers of Megatron-LM, which Ludwig does not load",
}
"""Fields that PEFT or the plugin sets, or that Ludwig has no use for, and why."""

NEVER = {
    **BOOKKEEPING,
    "use_effective_conv2d": "for convolutions, of which language models have none to adapt",
}
"""Fields that are no option of any type, and why."""

TEXTS: dict[str, str] = {
    "r": "Rank of the update.",
    "exclude_modules": "What `target_modules` matches but gets no adapter: names or a regular expression, as there.",
    "layers_to_transform": "The layers that get an adapter. Null is all. Works with names and `all-linear`, not with "
    "an expression.",
    "layers_pattern": "The name of the model's list of layers, for `layers_to_transform`, where it has several. Null "
    "takes any.",
    "modules_to_save": "Modules that are trained in full beside the adapter, and saved with it. Example: `[lm_head]`.",
    "bias": "Which of the base's biases are trained too: `none`, `all`, or those of adapted layers (`..._only`).",
    "init_weights": "Whether the adapter starts as the method says. With false it starts at random and changes the "
    "model before it is trained.",
    "rank_pattern": "Ranks that differ from `r`: by the end of a module's name, or an expression for it. Example: "
    "`{k_proj: 4}`.",
    "alpha_pattern": "Values that differ from `alpha`, as in `rank_pattern`.",
    "save_projection": "Whether the frozen random matrices are saved with the adapter. Without, a file is smaller and "
    "they are drawn again from their seed, which gives the same numbers with the same version of torch.",
    "projection_prng_key": "Seed of the frozen random matrices.",
    "module_dropout": "Probability that a module's whole update is left out of a training step.",
    "rank_dropout": "Dropout on the ranks of the update while training.",
}
"""Descriptions by field, where a field means the same in every method."""


@dataclass(frozen=True)
class Derived:
    """One option of a type.

    Attributes:
        name: the option in the config file.
        field: the field of the PEFT config it sets.
        values: which values it takes.
        default: its value when it is not given; None leaves PEFT's default, or what the type fits to the base.
        description: what it does.
    """

    name: str
    field: str
    values: Values
    default: Any
    description: str


def own_fields(config: type[PeftConfig]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a PEFT config class that its constructor takes, by name."""
    return {field.name: field for field in dataclasses.fields(config) if field.init}


def derive(
    config: type[PeftConfig],
    *,
    renamed: dict[str, str],
    removed: dict[str, str],
    defaults: dict[str, Any],
    texts: dict[str, str],
    values: dict[str, Values],
) -> Iterator[Derived]:
    """Yield the options of a type that makes a `config`.

    Args:
        config: the method's config class in PEFT.
        renamed: option by field, where the two have different names.
        removed: fields that are no option, with the reason.
        defaults: by option, where ours differs from PEFT's.
        texts: descriptions by option.
        values: which values an option takes, where PEFT's annotation does not say.
    """
    hints = typing.get_type_hints(config)
    for name, field in own_fields(config).items():
        if name in removed or (name in NEVER and name not in renamed):
            continue
        target = renamed.get(name, name)
        default = defaults.get(target, _default(field))
        stated, help_text = values.get(target), _help(field)
        try:
            allowed = values_of(name, hints[name], default, help_text) if stated is None else stated
        except UnknownKindError:
            continue  # reported by `not_offered`
        allowed = allowed.or_null() if default is None else allowed
        text = texts.get(target) or TEXTS.get(name) or _shortened(help_text)
        yield Derived(target, name, allowed, default, text)


def not_offered(config: type[PeftConfig], removed: dict[str, str], renamed: dict[str, str]) -> dict[str, str]:
    """Return the fields of a PEFT config class that are no option, with the reason."""
    hints = typing.get_type_hints(config)
    result = {}
    for name, field in own_fields(config).items():
        if name in removed:
            result[name] = removed[name]
        elif name in NEVER and name not in renamed:
            result[name] = NEVER[name]
        else:
            try:
                values_of(name, hints[name], _default(field))
            except UnknownKindError as kind:
                result[name] = f"takes {kind}, which a config file cannot hold"
    return result


def with_options[T: type[Any]](cls: T, name: str, summary: str, derived: list[Derived]) -> T:
    """Return `cls` with the option `type: <name>` and those `derived` that it does not declare itself."""
    declared = set(getattr(cls, "model_fields", {}))
    annotations: dict[str, Any] = {"type": str}
    fields: dict[str, Any] = {"type": schema_utils.ProtectedString(name, description=summary)}
    for entry in derived:
        if entry.name not in declared:
            annotations[entry.name] = Any
            fields[entry.name] = option(entry.values.schema, entry.values.expects, entry.description, entry.default)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body = {**names, "__annotations__": annotations, **fields}
    # The metaclass of Ludwig's configs makes options of what a class body holds, so the derived ones go into one.
    result: T = types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(body))  # type: ignore[assignment]
    return result


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default as a plain value; None for a mapping or list that starts empty."""
    if field.default is not dataclasses.MISSING:
        return getattr(field.default, "value", field.default)
    return None


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata.get("help") or ""
    return " ".join((" ".join(text) if isinstance(text, tuple | list) else str(text)).split())


def _shortened(text: str) -> str:
    """Return as many whole sentences of PEFT's help as fit, at least one."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if kept and len(kept) + len(sentence) >= LONGEST_HELP:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if not kept or kept.endswith((".", "!", "?", "`")) else f"{kept}."
