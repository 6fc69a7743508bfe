"""Have transformers load the linear layers of a model in 8-bit rows: rounded a tensor at a time, on their device.

A checkpoint is read as always (safetensors, in shards, straight to the device); between reading a weight and putting
it into the model, transformers calls a quantiser that is registered with it. So at no time there is more than one
layer in the checkpoint's precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ludwig_peft_plugin.model.checkpoint_quantization import ROWS
from ludwig_peft_plugin.model.float8 import Float8Linear
from ludwig_peft_plugin.model.row_scaled import Int8Linear, RowScaledLinear

LAYERS: dict[str, type[RowScaledLinear]] = {"float8": Float8Linear, "int8_weight_only": Int8Linear}
"""The layer by the name Ludwig has for it in `quantization.mode`."""


@register_quantization_config(ROWS)
class RowScaledConfig(QuantizationConfigMixin):
    """`quantization_config` for `from_pretrained`: linear layers in 8-bit rows, but for the output layer.

    Embeddings, norms and layers that share their weight with another module keep the dtype of the model.
    """

    def __init__(self, mode: str = "float8", **_: Any) -> None:
        if mode not in LAYERS:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(LAYERS)}")
        self.quant_method = ROWS
        self.mode = mode


@register_quantizer(ROWS)
class RowScaledQuantizer(HfQuantizer):
    """Puts 8-bit layers in the place of linear layers and rounds their weights as they are read."""

    quantization_config: RowScaledConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        kind = LAYERS[self.quantization_config.mode]
        for name, module in list(model.named_modules()):
            if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept):
                model.set_submodule(name, _empty_layer(kind, module))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, RowScaledLinear):
                module.store(module.weight.data, module.scale)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter of the checkpoint is a weight that is rounded."""
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), RowScaledLinear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes of a number of a parameter, from which transformers reserves memory."""
        size: float = super().param_element_size(model, param_name, param)
        return 1.0 if self.param_needs_quantization(model, param_name) else size

    def get_quantize_ops(self) -> ConversionOps:
        """Return what rounds a weight."""
        return _Round()

    def is_serializable(self) -> bool:
        """Return False: adapters are saved without the base, and merged models are dequantised first."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


class _Round(ConversionOps):
    """Turns the weight of one layer into 8-bit rows and their scales."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path)
            if layer.source_cls is Conv1D:
                weight = weight.T
            if weight.shape != layer.weight.shape:
                raise ValueError(f"{name} has shape {list(weight.shape)}, the config says {list(layer.weight.shape)}")
            rows, scale = layer.round_rows(weight)
            stored |= {name: nn.Parameter(rows, requires_grad=False), f"{path}.scale": scale}
            layer._is_hf_initialized = True
        return stored


def _empty_layer(kind: type[RowScaledLinear], module: Any) -> RowScaledLinear:
    """Return an 8-bit layer without weights of the shape of a linear one."""
    outputs, inputs = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
    return kind(inputs, outputs, module.bias is not None, module.weight.dtype, type(module))
