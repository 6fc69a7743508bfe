"""Fill in what a config leaves open, before the config class reads it."""

from __future__ import annotations

import copy
import logging
from typing import Any

from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import BaseAdapterConfig
from ludwig.schema.utils import LudwigBaseConfig

from ludwig_peft_plugin.config.adapter_types import adapter_class, capabilities
from ludwig_peft_plugin.config.raw import section
from ludwig_peft_plugin.config.sections import Choice, options
from ludwig_peft_plugin.config.trainer import FineTuneTrainerConfig
from ludwig_peft_plugin.config.values import EXPONENT

logger = logging.getLogger(__name__)


def normalized(data: dict[str, Any], cls: type[LudwigBaseConfig]) -> dict[str, Any]:
    """Return a checked config as the config class takes it: what it leaves open is filled in, the given one kept.

    Raises:
        ConfigValidationError: the adapter type is for a quantised base, and `quantization` is null.
    """
    fields = cls.model_fields
    # An empty section in YAML is null; where null is not a value of its own, it means the defaults.
    data = {
        name: value
        for name, value in data.items()
        if value is not None or (name in fields and fields[name].get_default(call_default_factory=True) is None)
    }
    for features in ("input_features", "output_features"):
        if isinstance(data.get(features), list):
            shape: Any = options(cls)[features].shape
            data[features] = [_known_options(feature, shape.item) for feature in data[features]]
    _add_default_quantization(data)
    trainer = section(data, "trainer")
    if trainer:
        trainer = {name: _number(value) for name, value in trainer.items()}
        if trainer.get("learning_rate_scheduler", ...) is None:
            del trainer["learning_rate_scheduler"]
        data["trainer"] = trainer
    _add_learning_rate(data)
    hyperopt = section(data, "hyperopt")
    if section(hyperopt, "parameters"):
        spaces = {name: _space(space) for name, space in hyperopt["parameters"].items()}
        data["hyperopt"] = {**hyperopt, "parameters": spaces}
    return data


def _known_options(value: Any, shape: Any) -> Any:
    """Return a feature without what is no option of it or of its sections.

    Ludwig merges `defaults` into features that have not all of its options, and saves what it learnt from the data
    beside the options of encoders and decoders; both would make it warn at each load.
    """
    name = value.get(shape.key, shape.default) if isinstance(shape, Choice) and isinstance(value, dict) else None
    cls = shape.resolve(name) if name in getattr(shape, "registry", ()) else getattr(shape, "cls", None)
    if cls is None or not isinstance(value, dict):
        return value
    known = options(cls)
    return {key: _known_options(entry, known[key].shape) for key, entry in value.items() if key in known}


def _add_default_quantization(data: dict[str, Any]) -> None:
    named = section(section(data, "adapters"), "adapters")
    for adapter in (data.get("adapter"), *named.values()):
        cls = adapter_class(adapter)
        brings = capabilities(cls).default_quantization if cls is not None else None
        if not brings:
            continue
        if "quantization" not in data:
            data["quantization"] = copy.deepcopy(dict(brings))
        elif data["quantization"] is None:
            raise ConfigValidationError(
                "quantization: null, but this adapter type is for a quantised base; use adapter type `lora` instead"
            )


def _add_learning_rate(data: dict[str, Any]) -> None:
    """Give a trainer without a learning rate that of the adapter type: what suits LoRA is far off for others.

    Of several types it is the smallest, with which none of them diverges.
    """
    trainer = section(data, "trainer")
    if trainer.get("type") != "finetune" or trainer.get("learning_rate") is not None:
        return
    usual = FineTuneTrainerConfig.model_fields["learning_rate"].get_default(call_default_factory=True)
    rates = {name: getattr(cls, "learning_rate", None) or usual for name, cls in _trained_types(data).items()}
    if not rates or (rate := min(rates.values())) == usual == max(rates.values()):
        return
    data["trainer"] = {**trainer, "learning_rate": rate}
    if len(set(rates.values())) > 1:
        each = ", ".join(f"{name} {value:g}" for name, value in rates.items())
        logger.info("trainer.learning_rate is not given: %g, the smallest of what the adapters use (%s).", rate, each)


def _trained_types(data: dict[str, Any]) -> dict[str, type[BaseAdapterConfig]]:
    """Return the types of the adapters that training changes, by their names; a merged one is of its sources' type."""
    given = section(data, "adapters")
    named = section(given, "adapters")
    merge = section(given, "merge")
    kinds = {name: adapter_class(value) for name, value in (named or {"adapter": data.get("adapter")}).items()}
    if merge.get("sources"):
        kinds[merge.get("name") or "merged"] = kinds.get(merge["sources"][0])
    trained = given.get("trained") or given.get("active") or list(kinds)[:1]
    names = [trained] if isinstance(trained, str) else trained
    return {name: cls for name, cls in kinds.items() if name in names and cls is not None}


def _space(space: Any) -> Any:
    """Return a search space with its bounds as numbers."""
    return {name: _number(value) for name, value in space.items()} if isinstance(space, dict) else space


def _number(value: Any) -> Any:
    """Return `2e-4`, which YAML 1.1 reads as text, as the number that was meant."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
