"""Replacements for the two config checks of Ludwig that know only the adapter type `lora`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ludwig.constants import MODEL_LLM
from ludwig.error import ConfigValidationError

from ludwig_peft_plugin._replace import LudwigChangedError
from ludwig_peft_plugin.config.adapter_types import adapter_class, merge_problem, quantization_problem
from ludwig_peft_plugin.config.quantization_rules import NO_ADAPTER

Check = Callable[[Any], None]


def check_qlora_requirements(config: Any) -> None:
    """Raise unless what is trained can be trained on a quantised base."""
    if config.model_type != MODEL_LLM or config.trainer.type == "none" or not config.quantization:
        return
    named = config.adapters.adapters if getattr(config, "adapters", None) else {}
    found: list[tuple[str, Any]] = [("adapter", config.adapter.type)] if config.adapter else []
    found += [(f"adapters.adapters.{name}", adapter) for name, adapter in named.items()]
    if not found:
        raise ConfigValidationError(
            f"quantization: {NO_ADAPTER.format('lora' if config.quantization.backend == 'torchao' else 'qlora')}"
        )
    for path, adapter in found:
        cls = adapter_class(adapter)
        kind = adapter if isinstance(adapter, str) else adapter["type"]
        text = quantization_problem(cls, kind, config.quantization.backend) if cls is not None else None
        if text:
            raise ConfigValidationError(f"{path}.type: {text}")


def check_qlora_merge_and_unload_compatibility(config: Any) -> None:
    """Raise when the adapter is to be merged into the base and cannot be."""
    if config.model_type != MODEL_LLM or config.trainer.type == "none" or not config.adapter:
        return
    if config.adapter.postprocessor and config.adapter.postprocessor.merge_adapter_into_base_model:
        text = merge_problem(type(config.adapter), config.adapter.type)
        if text:
            raise ConfigValidationError(f"adapter.postprocessor.merge_adapter_into_base_model: {text}")


REPLACEMENTS: tuple[Check, ...] = (check_qlora_requirements, check_qlora_merge_and_unload_compatibility)


def install_checks(registry: list[Check]) -> None:
    """Put the replacements into Ludwig's list of checks, in the places of the checks of the same name.

    Raises:
        LudwigChangedError: Ludwig has no check of that name; then nothing was replaced.
    """
    names = [getattr(check, "__name__", "") for check in registry]
    missing = [check.__name__ for check in REPLACEMENTS if check.__name__ not in names]
    if missing:
        raise LudwigChangedError(f"Ludwig has no config check named {', '.join(missing)} any more.")
    for check in REPLACEMENTS:
        registry[names.index(check.__name__)] = check
