"""The adapter types there are: their names, their other names, and what each can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from ludwig.schema.llms.peft import BaseAdapterConfig, adapter_registry
from ludwig.schema.model_types.llm import LLMModelConfig

from ludwig_peft_plugin.config.readable import reason
from ludwig_peft_plugin.config.suggest import hint


@dataclass(frozen=True)
class Capabilities:
    """What an adapter type can do.

    Attributes:
        quantized_base: trains on a base whose weights are in 4 or 8 bits.
        torchao_base: trains on a base quantised with `backend: torchao`.
        mergeable: can be folded into the base's weights.
        default_quantization: the `quantization` section it brings when the config has none.
    """

    quantized_base: bool
    torchao_base: bool
    mergeable: bool
    default_quantization: Mapping[str, Any] | None


def capabilities(adapter: type[BaseAdapterConfig]) -> Capabilities:
    """Return what an adapter class says it can do; one written for stock Ludwig says nothing, and can be merged."""
    quantized = bool(getattr(adapter, "quantized_base", False))
    stated: bool | None = getattr(adapter, "torchao_base", None)
    return Capabilities(
        quantized_base=quantized,
        torchao_base=quantized if stated is None else stated,
        mergeable=bool(getattr(adapter, "mergeable", True)),
        default_quantization=getattr(adapter, "default_quantization", None),
    )


def canonical_types() -> dict[str, str]:
    """Return every other name of an adapter type with the name it is registered under."""
    return {
        str(alias).lower(): name
        for name, adapter in adapter_registry.items()
        for alias in getattr(adapter, "aliases", ())
        if str(alias).lower() not in adapter_registry
    }


def adapter_class(adapter: object) -> type[BaseAdapterConfig] | None:
    """Return the class of an adapter section (a name or a mapping with a `type`), None when there is none."""
    name = adapter.get("type") if isinstance(adapter, dict) else adapter
    if not isinstance(name, str):
        return None
    lowered = name.lower()
    found: type[BaseAdapterConfig] | None = adapter_registry.get(canonical_types().get(lowered, lowered))
    return found


def trains_quantized(adapter: type[BaseAdapterConfig], backend: str | None) -> bool:
    """Return whether an adapter trains on a base quantised with `quantization.backend` (None for bitsandbytes)."""
    able = capabilities(adapter)
    return able.torchao_base if backend == "torchao" else able.quantized_base


def types_on_quantized(backend: str | None) -> str:
    """Return the names of the adapter types that train on a base quantised with `backend`, for a message."""
    return ", ".join(
        f"`{name}`" for name in sorted(adapter_registry) if trains_quantized(adapter_registry[name], backend)
    )


def quantization_problem(adapter: type[BaseAdapterConfig], name: str, backend: str | None = None) -> str | None:
    """Return why an adapter cannot train on a base quantised with `backend`, None when it can."""
    if trains_quantized(adapter, backend):
        return None
    others = f"remove the quantization section or use one of {types_on_quantized(backend)}"
    if trains_quantized(adapter, "torchao"):
        others = f"use quantization: {{backend: torchao, mode: float8}}, {others}"
    because = getattr(adapter, "quantized_reason", "")
    return f"adapter type `{name}` cannot be trained on a quantised base{because and f', because {because}'}; {others}"


def merge_problem(adapter: type[BaseAdapterConfig], name: str) -> str | None:
    """Return why an adapter cannot be merged into the base, None when it can."""
    if capabilities(adapter).mergeable:
        return None
    return f"adapter type `{name}` cannot be merged into the base's weights; export it with `format: adapter` instead"


class AdapterSelection(schema_utils.TypeSelection):
    """Resolves an adapter section by its type or one of the type's other names; errors say what is wrong in a line."""

    def __init__(self, section: str = "adapter") -> None:
        super().__init__(
            registry=adapter_registry,
            description="The parameter-efficient method that is trained; null trains every weight.",
            allow_str_value=True,
            allow_none=True,
        )
        self.section = section

    def resolve(self, value: Any) -> BaseAdapterConfig | None:
        """Return the adapter's config object; `value` is a name, a mapping, an object or None."""
        if isinstance(value, str):
            value = {self.key: value}
        if isinstance(value, dict):
            cls = adapter_class(value)
            if cls is None:
                names = [*adapter_registry, *canonical_types()]
                known = hint(str(value.get(self.key)), names)
                raise ConfigValidationError(f"{self.section}.type: {value.get(self.key)!r} is not known; {known}")
            lowered = str(value[self.key]).lower()
            value = {**value, self.key: canonical_types().get(lowered, lowered)}
        try:
            resolved: BaseAdapterConfig | None = super().resolve(value)
        except ConfigValidationError as error:
            raise ConfigValidationError(f"{self.section}: {reason(error)}") from None
        return resolved

    def _jsonschema_type_mapping(self) -> dict[str, Any]:
        """Ludwig's schema of an adapter section, and the bare name of a type."""
        stock = schema_utils._field_info_to_jsonschema("adapter", LLMModelConfig.model_fields["adapter"])
        names = [*adapter_registry, *canonical_types()]
        return {**stock, "oneOf": [*stock["oneOf"], {"type": "string", "enum": names}]}
