"""A base loads with its linear layers in 8-bit rows, a layer at a time, and everything else as it is."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model import base_model
from ludwig_peft_plugin.model.dequantize import dequantize_model, plain_parameters
from ludwig_peft_plugin.model.float8 import Float8Linear
from ludwig_peft_plugin.model.row_scaled import Int8Linear, RowScaledLinear
from ludwig_peft_plugin.model.row_scaled_loading import LAYERS, RowScaledConfig

CPU = torch.device("cpu")
IDS = torch.arange(3, 43).reshape(2, 20)


def load(folder: Path, mode: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": CPU}, quantization_config=RowScaledConfig(mode)
    )
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def rounded(model: nn.Module) -> dict[str, RowScaledLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RowScaledLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", LAYERS)
def test_linear_layers_are_rounded_and_nothing_else(llama_folder: Path, mode: str, dtype: torch.dtype) -> None:
    model = load(llama_folder, mode, dtype)
    original = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    layers = rounded(model)
    linear = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(layers) == sorted(name for name in linear if name != "lm_head")
    for name, layer in layers.items():
        rows, scale = type(layer).round_rows(original.get_submodule(name).weight)
        assert torch.equal(layer.weight.float(), rows.float())
        assert torch.equal(layer.scale, scale)
    for name, parameter in original.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(model.get_parameter(name), parameter), name
            assert model.get_parameter(name).dtype == dtype
    assert model.is_quantized
    assert all(type(layer) is LAYERS[mode] for layer in layers.values())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("mode", "bound"), [("float8", 0.1), ("int8_weight_only", 0.03)])
def test_logits_are_those_of_the_dequantised_model_and_near_the_original(
    llama_folder: Path, mode: str, bound: float
) -> None:
    model = load(llama_folder, mode)
    before = logits(model)
    original = logits(AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32))
    assert 0 < (before - original).norm() / original.norm() < bound
    assert torch.equal(logits(load(llama_folder, mode)), before)
    plain = dequantize_model(model)
    assert not rounded(plain)
    assert not plain.is_quantized
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", LAYERS)
def test_no_more_than_one_layer_is_held_unrounded(
    llama_folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watch, whenever a layer is rounded, which matrices of the model exist in the checkpoint's precision."""
    kind = LAYERS[mode]
    held: list[int] = []
    round_rows = kind.round_rows

    def watched(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matrices = [
            tensor
            for tensor in gc.get_objects()
            if issubclass(type(tensor), torch.Tensor)
            and tensor.dtype is torch.float64
            and tensor.ndim == 2
            and tensor.shape != (96, 64)  # embeddings
            and not tensor.is_meta
        ]
        held.append(len({tensor.data_ptr() for tensor in matrices}))
        return round_rows(weight)

    monkeypatch.setattr(kind, "round_rows", staticmethod(watched))
    load(llama_folder, mode, torch.float64)  # a dtype that nothing else here has
    assert len(held) == 21
    assert max(held) == 1


def test_layers_that_share_their_weight_are_left_alone(tmp_path: Path, llama_folder: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(llama_folder)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", "float8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(rounded(model)) == 21


@pytest.mark.parametrize("mode", LAYERS)
def test_conv1d_layers_are_rounded_by_output(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model, original = load(tmp_path / "base", mode).eval(), GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    layer = model.transformer.h[0].attn.c_attn
    assert layer.scale.shape == (3 * 64, 1)
    assert layer.source_cls is Conv1D
    weight = plain_parameters(layer)["weight"]
    assert weight.shape == (64, 3 * 64)
    assert (weight - original.transformer.h[0].attn.c_attn.weight).abs().max() < 0.01
    before = logits(model)
    torch.testing.assert_close(before, logits(original), rtol=0, atol=0.2)
    torch.testing.assert_close(logits(dequantize_model(model)), before, rtol=0, atol=1e-5)


def test_memory_is_reserved_for_bytes(llama_folder: Path) -> None:
    """transformers asks for the size of every parameter and reserves that much on a GPU."""
    model = load(llama_folder, "float8", torch.bfloat16)
    sizes = {
        name: model.hf_quantizer.param_element_size(model, name, parameter)
        for name, parameter in model.named_parameters()
    }
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 1
    assert sizes["model.layers.0.self_attn.q_proj.bias"] == 2
    assert sizes["lm_head.weight"] == 2
    linear = sum(parameter.numel() for name, parameter in model.named_parameters() if sizes[name] == 1)
    rest = sum(parameter.numel() for name, parameter in model.named_parameters() if sizes[name] == 2)
    scales = sum(layer.scale.nbytes for layer in rounded(model).values())
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if not name.endswith("scale"))
    assert model.get_memory_footprint() == linear + 2 * rest + scales + buffers


def test_a_weight_of_another_shape_is_an_error(tmp_path: Path, llama_folder: Path, base_config: Any) -> None:
    shutil.copytree(llama_folder, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))
    config = base_config(tmp_path / "base", {"backend": "torchao", "mode": "float8"})
    with pytest.raises(ModelError, match=r"other shapes than its config\.json says"):
        base_model.load_base_model(config, base_model.load_model_config(config), CPU)


def test_is_not_saved_as_it_is(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(llama_folder, "float8").save_pretrained(tmp_path)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="'int4' is not one of float8, int8_weight_only"):
        RowScaledConfig("int4")


@pytest.mark.parametrize(("mode", "kind"), [("float8", Float8Linear), ("int8_weight_only", Int8Linear)])
def test_the_config_section_loads_it_frozen(
    base_config: Callable[..., Any], mode: str, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    config = base_config(quantization={"backend": "torchao", "mode": mode})
    base_model._tell_of_missing_units.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = base_model.load_base_model(config, base_model.load_model_config(config), CPU)
    assert {type(layer) for layer in rounded(model).values()} == {kind}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    told = [record.message for record in caplog.records if "float8 saves memory, but no time" in record.message]
    assert len(told) == (mode == "float8")
