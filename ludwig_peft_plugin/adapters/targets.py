"""Which modules of a model get an adapter: names, expressions and layer numbers resolved, and typos found."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.adapters.lora_options import LoraOptions
    from ludwig_peft_plugin.adapters.peft_method import PeftMethod

LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding)


@dataclass(frozen=True)
class Targets:
    """What an adapter config targets in a model.

    Attributes:
        target_modules: the value PEFT gets.
        names: full names of the modules that get an adapter.
    """

    target_modules: list[str] | str | None
    names: tuple[str, ...]


def linear_names(base: nn.Module) -> list[str]:
    """Return the full names of the linear layers, the output head among them."""
    return [name for name, module in base.named_modules() if isinstance(module, LINEAR)]


def suggestion(base: nn.Module, wanted: Iterable[str] = ()) -> str:
    """Return a sentence that names the linear modules of `base`, and the nearest to a name that was not found."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear_names(base)})
    near = [match for name in wanted for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1)]
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"{hint}The linear modules of this model are {', '.join(leaves)}; all-linear takes all but the output head."


def ends_in(name: str, wanted: str) -> bool:
    """Return whether a module's full name is `wanted` or ends in it, at a dot."""
    return name == wanted or name.endswith(f".{wanted}")


def matches_pattern(name: str, pattern: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` applies to a module, by PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_targets(base: PreTrainedModel, adapter: LoraOptions | PeftMethod) -> Targets:
    """Return what `adapter` targets in `base`.

    Raises:
        AdapterError: a name, expression or layer number of the config matches nothing.
    """
    wanted = _resolve(base, adapter)
    config = adapter.to_config(task_type="CAUSAL_LM", target_modules=wanted, init_lora_weights=True)
    if wanted is None or wanted == []:
        return Targets(wanted, ())
    plain = _without(config, "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    anywhere = _matching(base, plain)
    if adapter.target_modules is not None:
        _check_each(base, adapter, anywhere)
    _check_types(base, anywhere, wanted)
    _check_exclusions(base, adapter, anywhere)
    _check_layers(base, adapter, config)
    names = _matching(base, config)
    if not names:
        raise AdapterError(
            "adapter: target_modules, exclude_modules, layers_to_transform and modules_to_save together leave no "
            f"module for an adapter. {suggestion(base)}"
        )
    return Targets(wanted, tuple(names))


def _resolve(base: PreTrainedModel, adapter: LoraOptions | PeftMethod) -> list[str] | str | None:
    """Return `target_modules` for PEFT: the architecture's default filled in, `all-linear` named where it must be."""
    wanted = adapter.target_modules
    model_type = getattr(base.config, "model_type", None)
    if wanted is None:
        default = adapter.architecture_targets(str(model_type))
        if default is None and not getattr(adapter, "target_parameters", None):
            raise AdapterError(
                f"adapter.target_modules: PEFT has no default for the architecture {model_type!r}, so it must be "
                f"given. {suggestion(base)}"
            )
        return default if default is None or isinstance(default, str) else sorted(default)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        head = base.get_output_embeddings()
        names = [name for name in linear_names(base) if base.get_submodule(name) is not head]
        if not names:
            raise AdapterError(f"adapter.target_modules: all-linear finds no linear layer. {suggestion(base)}")
        # PEFT refuses layers_to_transform beside all-linear, and ignores it beside full names.
        by_name = getattr(adapter, "layers_to_transform", None) is not None or getattr(adapter, "shared_by_name", False)
        return sorted({name.rsplit(".", 1)[-1] for name in names}) if by_name else names
    return wanted


def _matching(base: nn.Module, config: Any) -> list[str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name, _ in base.named_modules() if name and check_target_module_exists(config, name)]


def _without(config: Any, *fields: str) -> Any:
    """Return a copy of a PEFT config with `fields` unset."""
    plain = copy.copy(config)
    for name in fields:
        setattr(plain, name, None)
    return plain


def _check_each(base: nn.Module, adapter: LoraOptions | PeftMethod, found: list[str]) -> None:
    """Raise if the expression, or one name of the list, matches no module."""
    wanted = adapter.target_modules
    if isinstance(wanted, str):
        if not found:
            raise AdapterError(
                f"adapter.target_modules: the regular expression {wanted!r} matches no full module name (an example is "
                f"{linear_names(base)[0]!r}); write [{wanted}] for a plain name. {suggestion(base, [wanted])}"
            )
        return
    missing = [entry for entry in wanted or [] if not any(ends_in(name, entry) for name in found)]
    if missing:
        raise AdapterError(
            f"adapter.target_modules: no module is called {', '.join(missing)}. {suggestion(base, missing)}"
        )


def _check_types(base: nn.Module, found: list[str], wanted: list[str] | str) -> None:
    """Raise if a module that matches is not one that can be adapted."""
    for name in found:
        module = base.get_submodule(name)
        if not isinstance(module, ADAPTABLE):
            raise AdapterError(
                f"adapter.target_modules: {wanted!r} matches {name!r}, a {type(module).__name__}, which is not a "
                f"linear or embedding layer. {suggestion(base)}"
            )


def _check_exclusions(base: nn.Module, adapter: LoraOptions | PeftMethod, found: list[str]) -> None:
    """Raise if an exclusion removes none of the modules `found`."""
    excluded = getattr(adapter, "exclude_modules", None)
    if excluded is None:
        return
    entries = [excluded] if isinstance(excluded, str) else excluded
    for entry in entries:
        hit = any(re.fullmatch(entry, n) if isinstance(excluded, str) else ends_in(n, entry) for n in found)
        if not hit:
            raise AdapterError(
                f"adapter.exclude_modules: {entry!r} matches none of the modules that target_modules selects; remove "
                f"it, or correct it. {suggestion(base, [entry])}"
            )


def _check_layers(base: PreTrainedModel, adapter: LoraOptions | PeftMethod, config: Any) -> None:
    """Raise if a layer number of `layers_to_transform` selects no module."""
    asked = getattr(adapter, "layers_to_transform", None)
    if asked is None:
        return
    if isinstance(adapter.target_modules, list) and any(
        entry in dict(base.named_modules()) for entry in config.target_modules
    ):
        raise AdapterError(
            "adapter.layers_to_transform has no effect on target_modules that are full names; give the ends of names "
            "(q_proj), or leave layers_to_transform out."
        )
    count = base.config.get_text_config().num_hidden_layers
    probe = copy.copy(config)
    for layer in [asked] if isinstance(asked, int) else asked:
        probe.layers_to_transform = [layer]
        if not _matching(base, probe):
            where = getattr(adapter, "layers_pattern", None)
            pattern = f" with layers_pattern: {where}" if where else ""
            raise AdapterError(
                f"adapter.layers_to_transform: layer {layer} selects no module{pattern}. The model has {count} layers, "
                f"0 to {count - 1}."
            )
