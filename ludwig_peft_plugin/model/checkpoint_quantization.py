"""How a base's weights are quantised while they are loaded, or were when they were stored, and whether that is right.

A checkpoint may hold weights that bitsandbytes quantised before; its config.json says so. It is loaded as it is, with
the `quantization` section left out or in agreement with it.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch

from ludwig_peft_plugin.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

FOLLOWED = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
"""Options that say how 4-bit weights were rounded; left at their defaults, they follow the checkpoint."""
ROWS = "ludwig_peft_plugin_rows"
"""The method, as transformers knows it, of what this plugin has for `backend: torchao`."""
STATISTICS = (
    ".SCB",
    ".weight_format",
    ".absmax",
    ".quant_map",
    ".quant_state.",
    ".weight_scale",
    ".qzeros",
    "_scale_inv",
)
"""Parts of the names under which quantised checkpoints store what their weights are scaled by."""


def loading_arguments(config_obj: Any, model_config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments `config` and, where needed, `quantization_config` of `from_pretrained`.

    Args:
        config_obj: the Ludwig config.
        model_config: the base model's config; stays as it is.
        dtype: of the computation, which `bnb_4bit_compute_dtype: auto` stands for.

    Raises:
        ModelError: the config and the checkpoint disagree.
    """
    asked = config_obj.quantization
    stored = stored_quantization(model_config)
    if stored is None:
        return {"config": model_config} | ({"quantization_config": _settings(asked, dtype)} if asked else {})
    if asked:
        _check_agreement(config_obj, stored)
    if _method(stored) != "bitsandbytes":
        return {"config": model_config}
    stored = dict(stored)
    if asked:
        stored["llm_int8_threshold"] = asked.llm_int8_threshold
    compute = "auto" if asked is None else asked.bnb_4bit_compute_dtype
    stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.") if compute == "auto" else compute
    model_config = copy.deepcopy(model_config)
    model_config.quantization_config = stored
    return {"config": model_config}


def stored_quantization(model_config: PretrainedConfig) -> dict[str, Any] | None:
    """Return what a checkpoint's config says about how its weights are quantised, None when they are not."""
    parts = (model_config, model_config.get_text_config(decoder=True))  # transformers looks in both
    settings = next((part.quantization_config for part in parts if getattr(part, "quantization_config", None)), None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, dict) else dict(settings.to_dict())


def quantization_backend(model: Any) -> str | None:
    """Return the `quantization.backend` by which a loaded base is quantised, another method's name, or None."""
    stored = stored_quantization(model.config)
    method = None if stored is None else _method(stored)
    return "torchao" if method == ROWS else method


def check_loaded(model: PreTrainedModel, loading_info: dict[str, Any], base_model: str) -> None:
    """Check that every weight of a loaded base came from its checkpoint, and as what it is.

    transformers fills in random weights for missing ones, and takes quantised weights for plain ones, or the other way
    round, where config.json does not fit the files.

    Raises:
        ModelError: naming what does not fit.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(parameters & set(loading_info["missing_keys"]))
    if missing:
        raise ModelError(
            f"base_model: the files of {base_model!r} lack {len(missing)} weights of the model, as {missing[0]}. They "
            "would be random; use a complete model."
        )
    foreign = [name for name in loading_info["unexpected_keys"] if any(part in name for part in STATISTICS)]
    plain = [name for name, module in model.named_modules() if _is_unfilled(module)]
    if foreign or plain:
        what = f"holds {sorted(foreign)[0]}, for quantised weights" if foreign else f"holds {plain[0]} unquantised"
        raise ModelError(
            f"base_model: {base_model!r} {what}, and its config.json says otherwise. Put its quantization_config "
            "right, as it was when the model was saved."
        )


def _settings(quantization: Any, dtype: torch.dtype) -> Any:
    """Return the transformers quantisation config that a `quantization` section asks for."""
    if quantization.backend == "torchao":
        from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig

        return RowScaledConfig(quantization.mode)
    settings = quantization.to_bitsandbytes()
    if quantization.bnb_4bit_compute_dtype == "auto":
        settings.bnb_4bit_compute_dtype = dtype
    return settings


def _method(stored: dict[str, Any]) -> str:
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    method = stored.get("quant_method")
    return str(getattr(method, "value", method))


def _check_agreement(config_obj: Any, stored: dict[str, Any]) -> None:
    """Raise unless a `quantization` section fits what the checkpoint holds."""
    asked, name, method = config_obj.quantization, config_obj.base_model, _method(stored)
    bits = (4 if stored.get("load_in_4bit") else 8) if method == "bitsandbytes" else None
    if asked.backend != "bitsandbytes" or bits != asked.bits:
        wanted = f"{asked.bits} bits (bitsandbytes)" if asked.backend == "bitsandbytes" else asked.mode
        held = f"{bits} bits (bitsandbytes)" if bits else f"{method} format"
        instead = f"Set quantization: {{bits: {bits}}}" if bits else "Remove the section"
        raise ModelError(
            f"quantization: {wanted} is asked for, and the weights of {name!r} are stored in {held} already. "
            f"{instead}, or use the model they were made from."
        )
    if bits == 8:
        if asked.llm_int8_has_fp16_weight:
            raise ModelError(
                f"quantization.llm_int8_has_fp16_weight: the weights of {name!r} are stored in 8 bits, so there are "
                "none in 16; remove it."
            )
        return
    for option in FOLLOWED:
        mine, theirs = getattr(asked, option), stored.get(option)
        default = type(asked).model_fields[option].get_default(call_default_factory=True)
        if mine != theirs and mine != default:
            raise ModelError(
                f"quantization.{option}: {mine}, but it is {theirs} for the weights stored in {name!r}; remove it."
            )
        if mine != theirs:
            logger.info("quantization.%s is %s, as the weights of %s are stored", option, theirs, name)


def _is_unfilled(module: Any) -> bool:
    """Return whether a layer of bitsandbytes holds numbers that bitsandbytes did not round."""
    kind = type(module)
    if not kind.__module__.startswith("bitsandbytes."):
        return False
    if kind.__name__ == "Linear4bit":
        return getattr(module.weight, "quant_state", None) is None
    return (
        kind.__name__ == "Linear8bitLt"
        and getattr(module.weight, "SCB", None) is None
        and (module.weight.dtype is torch.int8)
    )
