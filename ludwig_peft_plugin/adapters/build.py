"""Put the adapter of a config on a base model: a new one, or one that was trained before."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ludwig.schema.llms.peft import BaseAdapterConfig

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME, AdapterConfig, Batches
from ludwig_peft_plugin.adapters.initial import initial_adapter
from ludwig_peft_plugin.adapters.io import load_adapter
from ludwig_peft_plugin.adapters.peft_build import adapter_parameters, is_quantized, wrap_with_peft
from ludwig_peft_plugin.config.adapter_types import trains_quantized, types_on_quantized
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.model.checkpoint_quantization import quantization_backend

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DECIDED_BY_FOLDER = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options (and their PEFT names) for which a config that differs from a loaded adapter gets a warning."""


def attach_adapter(base: PreTrainedModel, adapter: BaseAdapterConfig, *, batches: Batches | None = None) -> PeftModel:
    """Return `base`, changed in place, with the adapter of a config; only the adapter's parameters are trainable.

    The same seed of torch's generator gives the same initial weights. Adapter weights are float32.

    Args:
        base: the loaded base model, on the device on which it trains.
        adapter: an adapter section; `pretrained_adapter_weights` makes a trained adapter the start.
        batches: yields training batches on the base's device, for adapters with `needs_data`.

    Raises:
        AdapterError: an option cannot take effect on this base, or the trained adapter cannot be used.
    """
    kind = str(adapter.type)
    if is_quantized(base) and not trains_quantized(type(adapter), backend := quantization_backend(base)):
        because = getattr(adapter, "quantized_reason", "")
        raise AdapterError(
            f"adapter.type: {kind} does not work on a quantised base{because and f', because {because}'}. Remove the "
            "quantization section, or use one of "
            f"{types_on_quantized(backend)}."
        )
    if adapter.pretrained_adapter_weights:
        model = load_adapter(base, adapter.pretrained_adapter_weights, trainable=True)
        _compare(adapter, model)
    elif (earlier := initial_adapter(base)) is not None:
        raise AdapterError(
            f"adapter: the weights of this base were changed by init_lora_weights: {earlier.method} of an earlier "
            "adapter; load the base model again."
        )
    elif isinstance(adapter, AdapterConfig):
        model = adapter.build(base, batches)
    else:
        model = wrap_with_peft(base, adapter.to_config(task_type="CAUSAL_LM"))
    if not adapter_parameters(model):
        raise AdapterError(f"adapter.type: {kind} leaves no trainable parameter on this model; check its options.")
    return model


def _compare(adapter: BaseAdapterConfig, model: PeftModel) -> None:
    """Check that a trained adapter is of the type asked for, and say which options its folder decided otherwise."""
    loaded: Any = model.peft_config[ADAPTER_NAME]
    asked: Any = adapter.to_config(task_type="CAUSAL_LM", init_lora_weights=True)
    where = f"adapter.pretrained_adapter_weights: {adapter.pretrained_adapter_weights!r}"
    if loaded.peft_type != asked.peft_type:
        raise AdapterError(
            f"{where} is a {loaded.peft_type.value} adapter, not one of type {adapter.type}; set adapter.type to match."
        )
    if getattr(asked, "use_dora", False) and not loaded.use_dora:
        raise AdapterError(f"{where} is a LoRA adapter, not a DoRA one; use adapter.type: lora (or qlora).")
    for option, name in DECIDED_BY_FOLDER.items():
        if option not in adapter.model_fields_set or not hasattr(loaded, name):
            continue
        mine, theirs = getattr(asked, name), getattr(loaded, name)
        if mine is not None and mine != theirs and not (option == "target_modules" and mine == "all-linear"):
            logger.warning("%s decides %s: it is %s there, %s in the config.", where, option, theirs, mine)
