"""Wrap a base with PEFT: warnings that something asked was ignored become errors, the others are logged."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ludwig_peft_plugin.adapters.adaption_attention import prompts_in_float32
from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.peft_methods import method_of
from ludwig_peft_plugin.adapters.quantized_view import refuse_merging, remove_views, view_quantized
from ludwig_peft_plugin.adapters.targets import suggestion
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

IGNORED = (
    r"You have requested `ensure_weight_tying`",
    r"ensure_weight_tying=True but the model does not have tied weights",
    r"did not match any targeted module and were ignored",
    r"were set but no (module|parameter) was matched",
    r"but no modules were excluded",
    r"specified but will be ignored",
)
"""What PEFT's warnings say when an option has no effect."""

HARMLESS = (
    r"fan_in_fan_out is set to",  # PEFT corrects it by the layer type, which is why it is no option
    r"`base_model_name_or_path` was renamed",
    r"eva initialization used with low_cpu_mem_usage=False",
)


_HOOKED = "_ludwig_peft_plugin_keeps_statistics"


def wrap_with_peft(base: PreTrainedModel | PeftModel, config: PeftConfig, name: str = ADAPTER_NAME) -> PeftModel:
    """Return `base` wrapped by PEFT, with the adapter `config` describes, beside those it has already.

    The adapter is float32, also over a 16-bit or quantised base: small steps would be lost in 16 bits.

    Raises:
        AdapterError: PEFT refuses the config for this base, or ignores a part of it.
    """
    from peft import PeftModel, get_peft_model

    config.task_type = task_type(base)
    method = method_of(config)
    building = nullcontext() if method is None else method.building()
    with translated_warnings():
        try:
            if isinstance(base, PeftModel):
                model = base
                with checkpointing_hidden(base, config), prompts_in_float32(), building:
                    model.add_adapter(name, config, autocast_adapter_dtype=True)
            else:
                remove_views(base)
                if method is not None:
                    view_quantized(base, config)
                with checkpointing_hidden(base, config), prompts_in_float32(), building:
                    model = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=True)
                refuse_merging(model)
        except AdapterError:
            raise  # is a ValueError, and says it all
        except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = f" {suggestion(base)}" if re.search(r"target.modules", reason) else ""
            raise AdapterError(f"adapter: PEFT cannot build it on this model: {reason}{hint}") from error
    if method is not None:
        method.settle(model)
    _share_config(model.get_base_model())
    model.peft_config[name].base_model_name_or_path = portable_name(base)
    _keep_int8_statistics(base)
    return model


def _share_config(base: PreTrainedModel) -> None:
    """Let copies of layers (`layer_replication`) read the model's config, which says what attention runs."""
    for module in base.modules():
        if type(getattr(module, "config", None)) is type(base.config):
            module.config = base.config


def without_adapter(model: PeftModel) -> PreTrainedModel:
    """Return the base under a model's adapter, which is taken off."""
    inner: Any = model.base_model
    if hasattr(inner, "unload"):
        plain: PreTrainedModel = inner.unload()
        return plain
    if getattr(inner, "_enabled", False):  # an adaption prompt, which has no way to be taken off but this
        inner.disable_adapter_layers()
    return model.get_base_model()


@contextmanager
def checkpointing_hidden(base: Any, config: PeftConfig) -> Iterator[None]:
    """Let PEFT put a prefix on a base whose layers are checkpointed, which its own forward pass could not run."""
    hidden = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    hidden = hidden if config.is_prompt_learning else []
    for module in hidden:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in hidden:
            module.gradient_checkpointing = True


def task_type(base: PreTrainedModel) -> str:
    """Return PEFT's name of what a base computes: logits of the next token, or (a text encoder) hidden states."""
    return "CAUSAL_LM" if base.can_generate() else "FEATURE_EXTRACTION"


@contextmanager
def translated_warnings() -> Iterator[None]:
    """Raise AdapterError for a warning that an option was ignored, log the others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        if any(re.search(pattern, message) for pattern in IGNORED):
            raise AdapterError(f"adapter: an option would have no effect: {message}")
        if not any(re.search(pattern, message) for pattern in HARMLESS):
            logger.warning("adapter: %s", message)


def portable_name(base: PreTrainedModel) -> str | None:
    """Return the name of a base as its user gave it; of an absolute path, which means nothing elsewhere, the end."""
    name = str(getattr(base, "name_or_path", "") or "")
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name or None


def is_quantized(base: PreTrainedModel) -> bool:
    """Return whether the weights of `base` are quantised."""
    return bool(getattr(base, "is_quantized", False))


def _keep_int8_statistics(base: PreTrainedModel) -> None:
    """Let 8-bit layers on the CPU be used again after they were dequantised, as DoRA does in every step.

    On the CPU, PEFT's dequantisation puts the weight back without its row statistics, and bitsandbytes then takes the
    missing ones for the layer's. They are still in the layer's state, from where this hook brings them back.
    """

    def restore(layer: Any, inputs: Any) -> None:
        weight = layer.weight
        if getattr(weight, "CB", None) is not None and weight.SCB is None:
            weight.SCB = layer.state.SCB

    for module in base.modules():
        kind = type(module)  # PEFT has a class of the same name, without the weight's state
        if (
            kind.__name__ == "Linear8bitLt"
            and kind.__module__.startswith("bitsandbytes")
            and _HOOKED not in vars(module)
        ):
            module.register_forward_pre_hook(restore)
            setattr(module, _HOOKED, True)


def adapter_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the LoRA layers of a PEFT model, by module name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
