"""Export format `adapter`: the adapter alone, as `peft.PeftModel.from_pretrained(base, folder)` loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.quantized_view import PlainView
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.formats import ExportFormat, public_name, register_format, trained_dtype
from ludwig_peft_plugin.export.result import ExportOptions, Written
from ludwig_peft_plugin.model.base_model import SHIPPED_MODELS, load_base_model, load_model_config
from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig

WEIGHTS = "adapter_model.safetensors"


@register_format
class AdapterFormat(ExportFormat):
    """`adapter_config.json` and `adapter_model.safetensors`; the base is not copied."""

    name = "adapter"
    library = "peft"

    def check(self, config_obj: Any) -> None:
        """Raise `ExportError` when the config has no adapter."""
        if getattr(config_obj, "adapters", None):
            return
        if getattr(config_obj.adapter, "trains_base", False):
            raise ExportError("export: format adapter: full fine-tuning has no adapter; use format: merged.")
        if not config_obj.adapter:
            raise ExportError("export: format adapter needs an adapter section; without one, use format: merged.")

    def write(self, llm: Any, folder: Path, options: ExportOptions) -> Written:
        """Write the adapter; its weights keep the dtype they were trained in unless `options.dtype` says otherwise."""
        if not isinstance(llm.model, PeftModel):
            raise ExportError("export: format adapter: the adapter was merged into the base; use format: merged.")
        save_adapter(llm.model, str(folder), llm.model.active_adapters[0])
        _name_base_publicly(folder / "adapter_config.json", public_name(llm.config_obj.base_model))
        weights = load_file(folder / WEIGHTS)
        if options.dtype is not None:
            weights = {name: _cast(tensor, options.dtype) for name, tensor in weights.items()}
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        dtypes = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
        return Written(dtypes[0] if dtypes else torch.float32)

    def load(self, llm: Any, folder: Path, device: torch.device, stored: torch.dtype) -> nn.Module:
        """Load the base anew, as it was loaded for training, and let plain `peft` put the adapter on it.

        Plain PEFT has no layers for a quantised base in most of its methods; those are loaded as the plugin loads them.
        """
        base = load_base_model(llm.config_obj, load_model_config(llm.config_obj), device)
        if _stands_on_views(llm.model):
            return load_adapter(base, str(folder), trainable=False)
        model: nn.Module = PeftModel.from_pretrained(base, str(folder), torch_device=str(device))
        return model

    def memory_bytes(self, llm: Any, folder: Path) -> int:
        """Return the size of the base in memory and of the adapter's file."""
        base = llm.model.get_base_model() if isinstance(llm.model, PeftModel) else llm.model
        return int(base.get_memory_footprint()) + (folder / WEIGHTS).stat().st_size

    def loading_code(self, llm: Any, dtype: torch.dtype) -> str:
        """Return the lines that load base, adapter and tokenizer."""
        if _stands_on_views(llm.model):
            return loading_lines(
                llm,
                "from ludwig_peft_plugin.adapters.io import load_adapter\n",
                "model = load_adapter(base, folder, trainable=False)\n",
            )
        module = getattr(llm.config_obj.adapter, "peft_module", None)
        imports = f"import {module}  # noqa: F401 (PEFT learns the adapter's type)\n" if module else ""
        return loading_lines(
            llm, f"{imports}from peft import PeftModel\n", "model = PeftModel.from_pretrained(base, folder)\n"
        )


def _stands_on_views(model: nn.Module) -> bool:
    """Return whether an adapter sees quantised layers through the plugin's views."""
    return any(isinstance(module, PlainView) for module in model.modules())


def loading_lines(llm: Any, library_import: str, put_adapter: str) -> str:
    """Return lines that load base, adapter and tokenizer; `put_adapter` sets `model` from `base` and `folder`."""
    base_model = llm.config_obj.base_model
    name = public_name(base_model)
    imports, base = "", json.dumps(name)
    if base_model in SHIPPED_MODELS:
        imports = "from ludwig_peft_plugin.model.base_model import resolve_base_model\n"
        base = f"resolve_base_model({base})"
    elif name != base_model:
        base += "  # the folder of the base model"
    names, quantization = "AutoModelForCausalLM, AutoTokenizer", ""
    arguments = f'dtype="{str(trained_dtype(llm)).removeprefix("torch.")}"'
    live = llm.model.get_base_model() if isinstance(llm.model, PeftModel) else llm.model
    settings = getattr(live.config, "quantization_config", None)
    if isinstance(settings, RowScaledConfig):
        imports += "from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig\n"
        arguments += f", quantization_config=RowScaledConfig({json.dumps(settings.mode)})"
    elif settings is not None and not live.hf_quantizer.pre_quantized:
        names += ", BitsAndBytesConfig"
        quantization = f"quantization = BitsAndBytesConfig({_keywords(settings)})\n"
        arguments += ", quantization_config=quantization"
    return (
        f"{imports}{library_import}"
        f'from transformers import {names}\n\nfolder = "."  # where this file lies\n'
        f"base_model = {base}\n{quantization}"
        f"base = AutoModelForCausalLM.from_pretrained(base_model, {arguments})\n"
        f"{put_adapter}"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )


def _keywords(settings: Any) -> str:
    """Return a quantisation config's values that are not defaults as keyword arguments in Python."""
    values = settings.to_diff_dict() if hasattr(settings, "to_diff_dict") else dict(settings)
    kept = {key: value for key, value in values.items() if key.startswith(("load_in", "bnb_4bit", "llm_int8"))}
    written = {key: json.dumps(value) if isinstance(value, str) else repr(value) for key, value in kept.items()}
    return ", ".join(f"{key}={value}" for key, value in written.items())


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating point tensor in `dtype`, another one as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _name_base_publicly(config_file: Path, name: str) -> None:
    """Replace the base's place on this machine by its name; hub ids stay, so that PEFT finds them by itself."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
