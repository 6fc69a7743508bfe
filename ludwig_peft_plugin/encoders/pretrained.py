"""Start an encoder's adapter from a trained one (`pretrained_adapter_weights`), and save it as such a folder."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.initial import initial_adapter
from ludwig_peft_plugin.adapters.io import fill_adapter, save_adapter
from ludwig_peft_plugin.adapters.lora_fields import PEFT_FIELDS
from ludwig_peft_plugin.adapters.source import read_adapter
from ludwig_peft_plugin.encoders.adapted import adapted_encoders
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from ludwig.api import LudwigModel
    from ludwig.schema.llms.peft import BaseAdapterConfig
    from peft import PeftModel

FREE = re.compile(
    # Bookkeeping, and where the adapter goes, which the names and shapes of its tensors say.
    r"auto_mapping|base_model_name_or_path|inference_mode|peft_version|revision|task_type|peft_type|runtime_config"
    r"|target_modules|exclude_modules|layers_to_transform|layers_pattern|modules_to_save"
    # How it starts and how it is trained, which leaves open what trained tensors compute.
    r"|init_lora_weights|init_weights|(eva|corda|loftq|lora_ga)_config|.*dropout.*"
    r"|target_r|tinit|tfinal|deltaT|beta[12]|orth_reg_weight|total_step|use_asa|asa_.*|init_warmup|final_warmup"
    r"|mask_interval"
)
"""Fields of a PEFT config in which a trained adapter may differ from the one it is loaded into."""


def load_pretrained(model: PeftModel, adapter: BaseAdapterConfig) -> None:
    """Fill a new adapter with the weights in the folder `pretrained_adapter_weights` of its section.

    The section describes the adapter, so that a saved model is loaded without the folder; the folder has to fit it.

    Raises:
        AdapterError: the folder cannot be read, or its adapter is another one than the section's.
    """
    folder = str(adapter.pretrained_adapter_weights)
    where = f"adapter.pretrained_adapter_weights: {folder!r}"
    stored = read_adapter(folder)
    config: Any = model.peft_config[ADAPTER_NAME]
    mine: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))
    if stored.config["peft_type"] != mine["peft_type"]:
        raise AdapterError(
            f"{where} is a {stored.config['peft_type']} adapter, not one of type {adapter.type}; set adapter.type to "
            "match."
        )
    options = getattr(adapter, "renamed", PEFT_FIELDS)
    others = {
        str(options.get(name, name)): value
        for name, value in stored.config.items()
        if name in mine and (value or None) != (mine[name] or None) and not FREE.fullmatch(name)
    }
    if others:
        values = ", ".join(f"{option}: {json.dumps(value)}" for option, value in others.items())
        raise AdapterError(f"{where} was trained with other options than the config has; write {values}.")
    fill_adapter(model, stored)


def save_encoder_adapter(model: LudwigModel, feature: str, folder: str) -> None:
    """Write the adapter of one encoder to `folder`, from which PEFT and `pretrained_adapter_weights` load it.

    Args:
        model: a trained or loaded model of `model_type: ecd`.
        feature: the name of the input feature.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: the feature has no encoder with an adapter, or the adapter fits no other base.
        CheckpointError: the folder cannot be written.
    """
    found = {name: adapted for name, _, adapted in adapted_encoders(model.model)}
    if feature not in found:
        raise AdapterError(f"Input feature {feature!r} has no encoder with an adapter; those with one: {list(found)}.")
    adapted = found[feature]
    if (initial := initial_adapter(adapted.get_base_model())) is not None:
        raise AdapterError(
            f"The adapter of {feature!r} fits its own encoder only, whose weights init_lora_weights: {initial.method} "
            "has changed; train it with init_lora_weights: default."
        )
    save_adapter(adapted, folder)
