"""Whether the options that many PEFT methods share can take effect on a given base."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ludwig_peft_plugin.adapters.lora_checks import check_modules_to_save
from ludwig_peft_plugin.adapters.targets import Targets, matches_pattern, suggestion
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_options(base: PreTrainedModel, adapter: Any, targets: Targets) -> None:
    """Check what PEFT would ignore: patterns that match nothing, biases there are none of, modules that are not there.

    Raises:
        AdapterError: an option cannot take effect.
    """
    for option in type(adapter).model_fields:
        if option.endswith("_pattern") and isinstance(getattr(adapter, option), dict):
            _check_pattern(base, option, getattr(adapter, option), targets)
    if getattr(adapter, "modules_to_save", None):
        check_modules_to_save(base, adapter, targets)
    for option in ("bias", "bias_type"):
        if getattr(adapter, option, None) not in (None, "none"):
            _check_bias(base, option, getattr(adapter, option), targets)


def _check_pattern(base: PreTrainedModel, option: str, patterns: dict[str, Any], targets: Targets) -> None:
    for key in patterns:
        try:
            found = any(matches_pattern(name, key) for name in targets.names)
        except re.error as error:
            raise AdapterError(f"adapter.{option}: {key!r} is not a regular expression: {error}.") from error
        if not found:
            raise AdapterError(
                f"adapter.{option}: {key!r} matches no module that gets an adapter. {suggestion(base, [key])}"
            )


def _check_bias(base: PreTrainedModel, option: str, asked: str, targets: Targets) -> None:
    modules: Any = base.modules() if asked == "all" else [base.get_submodule(name) for name in targets.names]
    if all(getattr(module, "bias", None) is None for module in modules):
        where = "this model has" if asked == "all" else "the adapted modules have"
        raise AdapterError(f"adapter.{option}: {asked} has nothing to train, because {where} no bias; use none.")
