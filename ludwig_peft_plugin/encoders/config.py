"""Adapter sections of encoders in a config of `model_type: ecd`: bring them into one form, and find what is wrong.

Only these sections are checked; the rest of such a config is Ludwig's and stays as lenient as Ludwig is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonschema.exceptions import best_match
from ludwig.backend import RAY
from ludwig.config_validation.validation import VALIDATION_LOCK, get_schema, get_validator
from ludwig.constants import MODEL_ECD, TEXT
from ludwig.error import ConfigValidationError
from ludwig.schema.encoders.text_encoders import HFEncoderConfig
from ludwig.schema.encoders.utils import get_encoder_cls
from ludwig.schema.llms.peft import BaseAdapterConfig, adapter_registry

from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.config.adapter_types import AdapterSelection, adapter_class, canonical_types
from ludwig_peft_plugin.config.problems import Problem, report
from ludwig_peft_plugin.config.strict import section_problems

DEFAULT_ENCODER = "parallel_cnn"
LLM_ENCODER = "llm"
DEFAULT_INIT = (None, "default", True)
WRITE_IT = "encoder: {type: bert, adapter: {type: lora}}"


@dataclass(frozen=True)
class Place:
    """One encoder section of a config.

    Attributes:
        path: its path in the config.
        feature_type: the type of the feature it encodes.
        encoder: the section itself.
        kind: the encoder's type, given or inherited from `defaults`.
        feature: the feature, None for a section of `defaults`.
    """

    path: str
    feature_type: str
    encoder: dict[str, Any]
    kind: str
    feature: dict[str, Any] | None

    @property
    def saved(self) -> bool:
        """Whether Ludwig wrote the section: the config is that of a trained model."""
        return bool((self.feature or {}).get("proc_column"))

    @property
    def config_class(self) -> Any:
        """The schema class of the encoder, None where there is none of this type."""
        try:
            return get_encoder_cls(MODEL_ECD, self.feature_type, self.kind)
        except KeyError:
            return None

    @property
    def takes_adapter(self) -> bool:
        """Whether it is a text encoder an adapter can be put on."""
        cls = self.config_class
        return self.kind == LLM_ENCODER or (isinstance(cls, type) and issubclass(cls, HFEncoderConfig))


def normalized(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose encoders' adapters are mappings with a registered `type`, and are trained.

    Stock Ludwig leaves the encoder frozen, adapter included, unless `trainable: true` is given beside it. An adapter
    is there to be trained, so that is what `trainable` is by default where there is one. A type that comes with a
    quantised base (`qlora`) brings the `quantization` of the encoder that has such an option, `llm`.
    """
    if config.get("model_type", MODEL_ECD) != MODEL_ECD:
        return config
    if not any(place.encoder.get("adapter") is not None for place in places(config)):
        return config
    config = copy.deepcopy(config)
    for place in places(config):
        adapter = place.encoder.get("adapter")
        if isinstance(adapter, str):
            adapter = {"type": adapter}
        if not isinstance(adapter, dict):
            continue
        name = str(adapter.get("type", "")).lower()
        place.encoder["adapter"] = {**adapter, "type": canonical_types().get(name, name)} if name else adapter
        cls = adapter_class(adapter)
        quantization = getattr(cls, "default_quantization", None)
        if place.kind == LLM_ENCODER:
            if quantization and place.encoder.get("quantization") is None:
                place.encoder["quantization"] = dict(quantization)
        elif place.takes_adapter:
            place.encoder.setdefault("trainable", True)
    return config


def check_encoders(config: dict[str, Any]) -> None:
    """Raise one error that lists what is wrong with the adapters of a config's encoders, a line each.

    Args:
        config: a whole config, after `normalized` and with `defaults` merged into the features.

    Raises:
        ConfigValidationError: naming each option by its path, what is wrong with it and what would work.
    """
    problems = [
        Problem(name, f"has no effect with `model_type: ecd`; write it in the encoder of a feature, {WRITE_IT}")
        for name in ("adapter", "adapters", "quantization")
        if config.get(name) is not None
    ]
    found = list(places(config))
    for place in found:
        problems += _problems(config, place)
    problems += _tied_problems(found)
    if problems:
        raise ConfigValidationError(report(list({problem.path: problem for problem in problems}.values())))


def check_schema(config: dict[str, Any]) -> None:
    """Raise unless a config fits the JSON schema of its model type, as Ludwig's function of this name does.

    That one also checks the schema itself against the rules of JSON schemas for every config, which takes ten times as
    long as the rest: the schema holds every adapter type once for every encoder.

    Raises:
        ConfigValidationError: with Ludwig's message.
    """
    validator = get_validator()(get_schema(model_type=config.get("model_type", MODEL_ECD)))
    with VALIDATION_LOCK:
        error = best_match(validator.iter_errors(config))
    if error is not None:
        raise ConfigValidationError(f"Failed to validate JSON schema for config. Error: {error.message}") from error


def places(config: dict[str, Any]) -> Iterator[Place]:
    """Yield the encoder sections of a config that are mappings: those of `defaults`, then those of the features."""
    defaults = config.get("defaults")
    defaults = defaults if isinstance(defaults, dict) else {}
    inherited: dict[str, str] = {}
    for feature_type, section in defaults.items():
        encoder = section.get("encoder") if isinstance(section, dict) else None
        if isinstance(encoder, str):
            inherited[feature_type] = encoder
        if isinstance(encoder, dict):
            kind = inherited[feature_type] = str(encoder.get("type") or DEFAULT_ENCODER)
            yield Place(f"defaults.{feature_type}.encoder", feature_type, encoder, kind, None)
    features = config.get("input_features")
    for index, feature in enumerate(features if isinstance(features, list) else ()):
        encoder = feature.get("encoder") if isinstance(feature, dict) else None
        if isinstance(encoder, dict):
            feature_type = str(feature.get("type"))
            kind = str(encoder.get("type") or inherited.get(feature_type) or DEFAULT_ENCODER)
            yield Place(f"input_features[{index}].encoder", feature_type, encoder, kind, feature)


def fitting_types() -> list[str]:
    """Return the adapter types that can be put on a text encoder."""
    return sorted(name for name, cls in adapter_registry.items() if fits(cls))


def fits(cls: type[BaseAdapterConfig]) -> bool:
    """Return whether an adapter type can be put on a text encoder; a class that says nothing may try."""
    return bool(getattr(cls, "encoder", True)) and not getattr(cls, "default_quantization", None)


def works_between_steps(cls: type[BaseAdapterConfig]) -> bool:
    """Return whether an adapter type may have work to do between optimiser steps."""
    return getattr(cls, "step_hooks", None) not in (None, AdapterConfig.step_hooks)


def backend_problems(place: Place, backend: str | None) -> Iterator[Problem]:
    """Yield what the trainer of a backend (its type) cannot do for the adapter of a text encoder."""
    adapter = place.encoder.get("adapter")
    cls = adapter_class(adapter)
    if backend == RAY and isinstance(adapter, dict) and cls is not None and works_between_steps(cls):
        yield Problem(
            f"{place.path}.adapter.type",
            f"`{adapter['type']}` works between optimiser steps, which Ludwig's trainer for Ray has no place for; use "
            "`backend: local`, or another type such as `lora`",
        )


def _problems(config: dict[str, Any], place: Place) -> Iterator[Problem]:
    """Yield what is wrong with the adapter, and the quantisation, of one encoder."""
    encoder, adapter = place.encoder, place.encoder.get("adapter")
    text = place.feature_type == TEXT
    if text and place.kind != LLM_ENCODER and encoder.get("quantization") is not None:
        yield Problem(
            f"{place.path}.quantization",
            f"has no effect in the encoder `{place.kind}`; remove it, or use the encoder `llm`, which can be quantised",
        )
    if adapter is None:
        return
    path = f"{place.path}.adapter"
    if text and not place.takes_adapter:
        yield Problem(
            path,
            f"cannot be applied to the encoder `{place.kind}`, which has no pretrained weights; remove it, or use a "
            "pretrained encoder such as `bert` or `auto_transformer`",
        )
        return
    wrong = section_problems(config, adapter, path)
    yield from wrong
    cls = adapter_class(adapter)
    if wrong or cls is None or not text:
        return
    name = str(adapter["type"])
    if place.kind != LLM_ENCODER and not fits(cls):
        why = "needs a quantised base" if getattr(cls, "default_quantization", None) else "does not fit a text encoder"
        fitting = ", ".join(f"`{other}`" for other in fitting_types())
        yield Problem(f"{path}.type", f"`{name}` {why}; use one of {fitting}")
        return
    if not place.saved:
        yield from _without_effect(config, place, cls, adapter, path)


def _without_effect(
    config: dict[str, Any], place: Place, cls: type[BaseAdapterConfig], adapter: dict[str, Any], path: str
) -> Iterator[Problem]:
    """Yield what would keep the adapter, or one of its options, from taking effect."""
    encoder, feature = place.encoder, place.feature or {}
    if encoder.get("trainable") is False and place.kind != LLM_ENCODER:
        yield Problem(
            f"{place.path}.trainable", "false would freeze the adapter too; remove it, or the adapter (adapter: null)"
        )
    if encoder.get("use_pretrained") is False and getattr(cls, "family", "") != "selective":
        yield Problem(
            f"{place.path}.use_pretrained",
            "false leaves the encoder at random weights, which an adapter keeps; remove it, or the adapter",
        )
    if (feature.get("preprocessing") or {}).get("cache_encoder_embeddings"):
        yield Problem(
            f"{place.path.rpartition('.')[0]}.preprocessing.cache_encoder_embeddings",
            "true needs an encoder that does not change, and its adapter is trained; remove it, or the adapter",
        )
    kwargs = encoder.get("pretrained_kwargs") or {}
    for key in ("quantization_config", "load_in_4bit", "load_in_8bit"):
        if kwargs.get(key):
            yield Problem(
                f"{place.path}.pretrained_kwargs.{key}",
                "gives a quantised encoder, which Ludwig cannot load again; remove it, or use the encoder `llm`",
            )
    if adapter.get("pretrained_adapter_weights") is not None and adapter.get("init_lora_weights") not in DEFAULT_INIT:
        yield Problem(
            f"{path}.init_lora_weights", "has no effect: pretrained_adapter_weights gives the weights; remove it"
        )
    yield from backend_problems(place, _backend(config))
    if (adapter.get("postprocessor") or {}).get("merge_adapter_into_base_model"):
        yield Problem(
            f"{path}.postprocessor.merge_adapter_into_base_model",
            "has no effect in an encoder: the model is saved with its adapter; remove it",
        )
    try:
        resolved = AdapterSelection(path).resolve(adapter)
    except ConfigValidationError as error:
        yield Problem(path, str(error).removeprefix(f"{path}: "))
        return
    if place.kind == LLM_ENCODER and getattr(getattr(resolved, "init", None), "changes_base", False):
        yield Problem(
            f"{path}.init_lora_weights",
            "changes the base's weights, which are not saved in the encoder `llm`; use default",
        )
    if getattr(resolved, "needs_data", False):
        yield Problem(
            f"{path}.init_lora_weights",
            "reads training rows, which are not there when an encoder is built; use `default`, `orthogonal` or (not in "
            "the encoder `llm`) `pissa`",
        )


def _backend(config: dict[str, Any]) -> str | None:
    """Return the type of the backend that a config names, None where it names none."""
    backend = config.get("backend")
    return backend.get("type") if isinstance(backend, dict) else backend


def _tied_problems(found: list[Place]) -> Iterator[Problem]:
    """Yield the features that share another's encoder but name an adapter of their own."""
    by_name = {str(place.feature["name"]): place for place in found if place.feature and place.feature.get("name")}
    for place in by_name.values():
        tied = (place.feature or {}).get("tied")
        own, other = place.encoder.get("adapter"), by_name[tied].encoder.get("adapter") if tied in by_name else None
        if tied and own is not None and own != other:
            yield Problem(f"{place.path}.adapter", f"has no effect: the encoder is that of `{tied}`; write it there")
