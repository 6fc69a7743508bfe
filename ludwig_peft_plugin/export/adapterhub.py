"""Export format `adapterhub`: a bottleneck adapter as AdapterHub's library `adapters` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.bottleneck.adapterhub import WEIGHTS_NAME, write_folder
from ludwig_peft_plugin.adapters.io import load_adapter
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.adapter import loading_lines
from ludwig_peft_plugin.export.formats import ExportFormat, public_name, register_format
from ludwig_peft_plugin.export.result import ExportOptions, Written
from ludwig_peft_plugin.model.base_model import load_base_model, load_model_config

PUT_ADAPTER = (
    "model = base\nadapters.init(model)\nmodel.set_active_adapters(model.load_adapter(folder, use_safetensors=True))\n"
)


@register_format
class AdapterHubFormat(ExportFormat):
    """`adapter_config.json` and `adapter.safetensors` with that library's names; the base is not copied."""

    name = "adapterhub"
    library = "adapters"

    def check(self, config_obj: Any) -> None:
        """Raise `ExportError` when the config's adapter is none that the library has."""
        adapter = config_obj.adapter
        if getattr(config_obj, "adapters", None) or not hasattr(adapter, "adapterhub_obstacle"):
            raise ExportError(
                "export: format adapterhub writes one bottleneck adapter (adapter: {type: bottleneck}); use format: "
                "adapter."
            )

    def write(self, llm: Any, folder: Path, options: ExportOptions) -> Written:
        """Write the adapter; its weights keep the dtype they were trained in unless `options.dtype` says otherwise."""
        if not isinstance(llm.model, PeftModel):
            raise ExportError("export: format adapterhub: the model carries no adapter any more.")
        if (obstacle := llm.config_obj.adapter.adapterhub_obstacle(llm.model)) is not None:
            raise ExportError(f"export: format adapterhub: {obstacle}")
        name = public_name(llm.config_obj.base_model)
        write_folder(llm.model, folder, str(llm.config_obj.adapter.type), ADAPTER_NAME, base_model=name)
        if options.dtype is None:
            return Written(torch.float32)
        weights = {key: tensor.to(options.dtype) for key, tensor in load_file(folder / WEIGHTS_NAME).items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        return Written(options.dtype)

    def load(self, llm: Any, folder: Path, device: torch.device, stored: torch.dtype) -> nn.Module:
        """Load the base anew and put the adapter on it as the folder describes it; their library is not needed."""
        base = load_base_model(llm.config_obj, load_model_config(llm.config_obj), device)
        model: nn.Module = load_adapter(base, str(folder), trainable=False)
        return model

    def memory_bytes(self, llm: Any, folder: Path) -> int:
        """Return the size of the base in memory and of the adapter's file."""
        return int(llm.model.get_base_model().get_memory_footprint()) + (folder / WEIGHTS_NAME).stat().st_size

    def loading_code(self, llm: Any, dtype: torch.dtype) -> str:
        """Return the lines that load base, adapter and tokenizer, with transformers 4.57 beside `adapters` 1.3."""
        return loading_lines(llm, "import adapters\n", PUT_ADAPTER)
