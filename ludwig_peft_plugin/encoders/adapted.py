"""Find the adapters in the encoders of an ordinary Ludwig model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ludwig.encoders.text_encoders import LLMEncoder

from ludwig_peft_plugin.config.adapter_types import AdapterSelection

if TYPE_CHECKING:
    from ludwig.schema.llms.peft import BaseAdapterConfig
    from peft import PeftModel


def adapted_encoders(model: Any) -> Iterator[tuple[str, BaseAdapterConfig, PeftModel]]:
    """Yield (feature name, adapter section, adapted transformer) of every encoder with an adapter of PEFT.

    An encoder that several features share comes once, with the first of them.

    Args:
        model: a model of `model_type: ecd`.
    """
    from peft import PeftModel

    seen: set[int] = set()
    for name, feature in model.input_features.items():
        encoder: Any = getattr(feature, "encoder_obj", None)
        adapted = encoder.model if isinstance(encoder, LLMEncoder) else _transformer(encoder)
        if isinstance(adapted, PeftModel) and id(adapted) not in seen:
            seen.add(id(adapted))
            adapter = AdapterSelection().resolve(encoder.config.adapter)
            if adapter is not None:
                yield name, adapter, adapted


def _transformer(encoder: Any) -> Any:
    return getattr(getattr(encoder, "transformer", None), "module", None)
