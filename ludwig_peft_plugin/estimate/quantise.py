"""Give the linear layers of a model on the meta device the weights that quantisation would leave them with.

transformers decides which layers are quantised (not the output head, nor embeddings) and puts the library's layers in
their place; the library's own operators, which know the shapes of their results, then make the quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ludwig_peft_plugin.estimate.gpu_view import gpu_view
from ludwig_peft_plugin.estimate.replace import replaced


def quantise_on_meta(model: Any, settings: Any, dtype: torch.dtype) -> None:
    """Quantise `model` in place.

    Args:
        model: a transformers model on the meta device in `dtype`.
        settings: transformers' quantisation config, or its values by name.
        dtype: the number format in which the weights are read.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": torch.device("meta")})
    for module in list(model.modules()):
        quantise = _QUANTISE.get(type(module).__name__)
        if quantise is not None:
            quantise(module, dtype)
    with gpu_view():
        quantizer.postprocess_model(model)


@contextmanager
def copyable_weights() -> Iterator[None]:
    """Within the context, 4-bit weights on the meta device can be deep-copied, as DoRA does."""
    import bitsandbytes as bnb

    copy = bnb.nn.Params4bit.__deepcopy__

    def copied(weight: Any, memo: Any) -> Any:
        if weight.device.type != "meta":
            return copy(weight, memo)
        return bnb.nn.Params4bit(weight.data, **{**vars(weight), "module": None})

    with replaced(bnb.nn.Params4bit, {"__deepcopy__": copied}):
        yield


def _weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight as the checkpoint has it, shape (out, in)."""
    return torch.empty((layer.out_features, layer.in_features), dtype=dtype, device="meta")


def _four_bit(layer: Any, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb
    from bitsandbytes import functional

    # The library keeps the first code book it makes for all later weights; it must not be one without data.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    kept = layer.weight
    packed, state = functional.quantize_4bit(
        _weight(layer, dtype),
        blocksize=kept.blocksize,
        compress_statistics=kept.compress_statistics,
        quant_type=kept.quant_type,
        quant_storage=kept.quant_storage,
    )
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=kept.blocksize,
        compress_statistics=kept.compress_statistics,
        quant_type=kept.quant_type,
        quant_storage=kept.quant_storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    _bias(layer, dtype)


def _eight_bit(layer: Any, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    if layer.state.has_fp16_weights:
        layer.weight = bnb.nn.Int8Params(_weight(layer, dtype), requires_grad=False, has_fp16_weights=True)
    else:
        values = torch.empty((layer.out_features, layer.in_features), dtype=torch.int8, device="meta")
        scales = torch.empty(layer.out_features, dtype=torch.float32, device="meta")
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    _bias(layer, dtype)


def _rows(layer: Any, dtype: torch.dtype) -> None:
    """The plugin's 8-bit rows with a scale each, the layers of `backend: torchao`."""
    values = torch.float8_e4m3fn if type(layer).__name__ == "Float8Linear" else torch.int8
    weight = torch.empty((layer.out_features, layer.in_features), dtype=values, device="meta")
    layer.store(weight, torch.empty((layer.out_features, 1), dtype=torch.float32, device="meta"))


def _bias(layer: Any, dtype: torch.dtype) -> None:
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)


_QUANTISE: dict[str, Callable[[Any, torch.dtype], None]] = {
    "Linear4bit": _four_bit,
    "Linear8bitLt": _eight_bit,
    "Float8Linear": _rows,
    "Int8Linear": _rows,
}
"""How a layer's weight is made, by the class that transformers' quantiser has put in place."""
