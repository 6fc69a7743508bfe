"""Load what a config calls `base_model`: its config, its tokenizer and its (possibly quantised) frozen weights."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.checkpoint_quantization import check_loaded, loading_arguments, stored_quantization
from ludwig_peft_plugin.model.float8_arithmetic import has_float8_units

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED_MODELS = ("tiny-llama-python",)

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_base_model(name: str) -> str:
    """Return what transformers can load for `name`: a shipped model's folder, or `name` itself (a folder or hub id).

    The config keeps the name, so that a saved model can be loaded on a machine where the package lies elsewhere.
    """
    return str(ASSETS / name) if name in SHIPPED_MODELS else name


def load_model_config(config_obj: Any) -> PretrainedConfig:
    """Return the base model's transformers config with the `model_parameters` of the Ludwig config applied.

    Raises:
        ModelError: there is no such model, or a model parameter does not exist for this architecture.
    """
    config = _from_pretrained(AutoConfig, config_obj.base_model, trust_remote_code=config_obj.trust_remote_code)
    parameters = config_obj.model_parameters.to_dict() if config_obj.model_parameters else {}
    for name, value in parameters.items():
        if value is None or name == "neftune_noise_alpha":  # NEFTune is a training hook, not a model parameter
            continue
        if not hasattr(config, name):
            raise ModelError(
                f"model_parameters.{name} does not exist for the architecture {config.model_type!r} of "
                f"{config_obj.base_model!r}: remove it from the config."
            )
        if isinstance(value, dict):
            # Nested parameters such as rope_scaling keep what the checkpoint says and the user does not.
            value = {**(getattr(config, name) or {}), **value}
        setattr(config, name, value)
    return config


def load_tokenizer(base_model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer, with a pad token (eos where it has none) and left padding.

    The vocabulary is never changed, so the embeddings keep their size.

    Raises:
        ModelError: there is no tokenizer, or it has no end-of-sequence token to learn.
    """
    tokenizer = _from_pretrained(AutoTokenizer, base_model, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {base_model!r} has no end-of-sequence token, so the model could not learn where an "
            "answer ends. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def precision_dtype(config_obj: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of the base's weights and of the computation.

    `precision: auto` is bfloat16 where the device computes in it and float32 elsewhere. Full fine-tuning (no adapter)
    trains the weights themselves and stays in float32: a bfloat16 weight is too coarse to take a small update.
    """
    precision = getattr(config_obj, "precision", "auto")
    if precision != "auto":
        return PRECISIONS[precision]
    if trains_base(config_obj) or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def trains_base(config_obj: Any) -> bool:
    """Return whether the base's own weights are trained (fine-tuning without an adapter, or with type `full`)."""
    if config_obj.trainer.type == "none" or getattr(config_obj, "adapters", None):
        return False
    return not config_obj.adapter or bool(getattr(config_obj.adapter, "trains_base", False))


def load_base_model(config_obj: Any, model_config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """Load the base straight onto `device`, quantised when asked, with every weight frozen.

    Raises:
        ModelError: the weights are missing or unreadable, or the quantisation cannot be applied.
    """
    dtype = precision_dtype(config_obj, device)
    if trains_base(config_obj) and stored_quantization(model_config) is not None:
        raise ModelError(
            f"base_model: the weights of {config_obj.base_model!r} are quantised, so they cannot be trained "
            "themselves. Add `adapter: qlora`, or use the model they were made from."
        )
    arguments = loading_arguments(config_obj, model_config, dtype)
    logger.info("Loading %s in %s on %s", config_obj.base_model, dtype, device)
    model: PreTrainedModel
    model, loading_info = _from_pretrained(
        AutoModelForCausalLM,
        config_obj.base_model,
        trust_remote_code=config_obj.trust_remote_code,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        **arguments,
    )
    check_loaded(model, loading_info, config_obj.base_model)
    if getattr(config_obj.quantization, "mode", None) == "float8" and not has_float8_units(device):
        _tell_of_missing_units(str(device))
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such processors bitsandbytes repacks 4-bit weights in place when it evaluates, and gradients are lost.
            module.support_avx512bf16_for_cpu = False
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            state.dtype = dtype  # of a checkpoint in 4 bits: otherwise that of the model it was made from
    return model


@functools.cache
def _tell_of_missing_units(device: str) -> None:
    """Log, once for a device, that float8 is of use for memory alone there."""
    logger.warning("quantization.mode: float8 saves memory, but no time: %s does not multiply in float8.", device)


def load_merged_model(config_obj: Any, folder: str, device: torch.device) -> PreTrainedModel:
    """Load a full model that was saved by Ludwig in `folder` (after a merge, or after full fine-tuning)."""
    dtype = precision_dtype(config_obj, device)
    model: PreTrainedModel
    model, loading_info = _from_pretrained(
        AutoModelForCausalLM, folder, dtype=dtype, device_map={"": device}, output_loading_info=True
    )
    check_loaded(model, loading_info, folder)
    model.requires_grad_(trains_base(config_obj))
    return model


def context_length(model_config: PretrainedConfig) -> int:
    """Return the largest number of tokens the model was made for (2,048 where its config does not say)."""
    from ludwig.utils.llm_utils import get_context_len

    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return int(get_context_len(text_config))


def _from_pretrained(auto_class: Any, base_model: str, **arguments: Any) -> Any:
    """Call `auto_class.from_pretrained`, turning the many ways it fails into one short message."""
    path = resolve_base_model(base_model)
    if auto_class is AutoModelForCausalLM:
        arguments["use_safetensors"] = True
    try:
        return auto_class.from_pretrained(path, **arguments)
    except torch.OutOfMemoryError:
        raise  # is a RuntimeError, but nothing is wrong with the model
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(_explain(base_model, path, error)) from error


def _explain(base_model: str, path: str, error: Exception) -> str:
    """Return a few lines that say what is wrong with a base model and what would work."""
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if "ignore_mismatched_sizes" in reason:
        reason = (
            "its weights have other shapes than its config.json says (model_parameters changed them, or the weights "
            "are quantised and quantization_config is missing in config.json)."
        )
    elif "automatic conversion of the weights" in reason:
        reason = "some weights cannot be quantised, or have other shapes than its config.json says; the log names them."
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or folder.exists()
    if looks_local and not folder.is_dir():
        return f"base_model: the folder {base_model!r} does not exist."
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"base_model: the folder {base_model!r} holds no config.json, so it is not a transformers model."
        if not any(folder.glob("*.safetensors")):
            return (
                f"base_model: the folder {base_model!r} holds no weights in safetensors format (*.safetensors). "
                "Pickled weights (.bin, .pt) are not loaded, because they can run code: convert them first."
            )
        return f"base_model: {base_model!r} cannot be loaded: {reason}"
    return (
        f"base_model: {base_model!r} cannot be loaded from the Hugging Face hub: {reason}\n"
        f"Check the name, your network and, for gated models, `hf auth login`; a local folder and the shipped "
        f"{', '.join(SHIPPED_MODELS)} work without a hub."
    )
