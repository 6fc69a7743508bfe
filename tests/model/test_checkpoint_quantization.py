"""Checkpoints that are quantised already: loaded as they are stored, and an error where the config says otherwise."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.base_model import load_base_model, load_merged_model, load_model_config
from ludwig_peft_plugin.model.checkpoint_quantization import quantization_backend

CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KINDS = {
    "nf4": {**NF4, "bnb_4bit_compute_dtype": "bfloat16"},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}
FLOAT8 = {"backend": "torchao", "mode": "float8"}


@pytest.fixture(scope="session")
def stored(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of the tiny Llama as bitsandbytes stores it, by the kind of quantisation."""
    folders = {}
    for kind, settings in KINDS.items():
        model = AutoModelForCausalLM.from_pretrained(
            llama_folder,
            dtype=torch.bfloat16,
            device_map={"": CPU},
            quantization_config=BitsAndBytesConfig(**settings),
        )
        folders[kind] = tmp_path_factory.mktemp("stored") / kind
        model.save_pretrained(folders[kind])
    return folders


def load(config: Any) -> Any:
    return load_base_model(config, load_model_config(config), CPU)


def with_settings(source: Path, target: Path, settings: Any) -> Path:
    """Copy a model's folder, with another `quantization_config` in its config.json (None for none)."""
    shutil.copytree(source, target)
    file = target / "config.json"
    values = json.loads(file.read_text())
    values.pop("quantization_config", None)
    file.write_text(json.dumps(values | ({"quantization_config": settings} if settings else {})))
    return target


def settings_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("nf4", None),
        ("nf4", {"bits": 4}),
        ("fp4", None),
        ("fp4", {"bits": 4}),  # what qlora brings leaves the details at their defaults
        ("fp4", {"bits": 4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ("int8", None),
        ("int8", {"bits": 8}),
    ],
)
def test_loads_what_is_stored(
    stored: dict[str, Path], base_config: Callable[..., Any], kind: str, section: Any
) -> None:
    model = load(base_config(stored[kind], section)).train()
    reference = AutoModelForCausalLM.from_pretrained(stored[kind], dtype=torch.float32, device_map={"": CPU}).train()
    assert model.is_quantized
    assert quantization_backend(model) == "bitsandbytes"
    layer, expected = (m.model.layers[1].mlp.up_proj for m in (model, reference))
    assert torch.equal(layer.weight.data, expected.weight.data)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits, wanted = model(ids).logits, reference(ids).logits
    # The reference multiplies in the bfloat16 it was stored with, the other in the float32 of `precision`.
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0.05 * float(wanted.std()))


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float32), ("float16", torch.float16)])
def test_compute_dtype_is_the_configs(
    stored: dict[str, Path], base_config: Callable[..., Any], asked: str, dtype: torch.dtype
) -> None:
    layer = load(base_config(stored["nf4"], {"bnb_4bit_compute_dtype": asked})).model.layers[0].mlp.up_proj
    assert layer.compute_dtype == dtype
    assert layer.weight.quant_state.dtype == torch.float32


def test_threshold_is_the_configs(stored: dict[str, Path], base_config: Callable[..., Any]) -> None:
    model = load(base_config(stored["int8"], {"bits": 8, "llm_int8_threshold": 3.0}))
    assert model.model.layers[0].mlp.up_proj.state.threshold == 3.0


def test_details_that_follow_the_checkpoint_are_told(
    stored: dict[str, Path], base_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(base_config(stored["fp4"], {"bits": 4}))
    assert "quantization.bnb_4bit_quant_type is fp4, as the weights of" in caplog.text


@pytest.mark.parametrize(
    ("kind", "section", "parts"),
    [
        ("nf4", {"bits": 8}, ["8 bits (bitsandbytes) is asked for", "stored in 4 bits", "quantization: {bits: 4}"]),
        ("int8", {"bits": 4}, ["4 bits (bitsandbytes) is asked for", "stored in 8 bits", "quantization: {bits: 8}"]),
        ("nf4", FLOAT8, ["float8 is asked for", "stored in 4 bits", "the model they were made from"]),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, ["bnb_4bit_quant_type: fp4, but it is nf4", "remove it"]),
        ("nf4", {"bnb_4bit_use_double_quant": False}, ["bnb_4bit_use_double_quant: False, but it is True"]),
        ("int8", {"bits": 8, "llm_int8_has_fp16_weight": True}, ["llm_int8_has_fp16_weight", "remove it"]),
    ],
)
def test_config_that_disagrees(
    stored: dict[str, Path], base_config: Callable[..., Any], kind: str, section: Any, parts: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        load(base_config(stored[kind], section))
    assert str(caught.value).startswith("quantization")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_checkpoint_of_another_method(llama_folder: Path, tmp_path: Path, base_config: Callable[..., Any]) -> None:
    folder = with_settings(llama_folder, tmp_path / "gptq", {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"stored in gptq format already. Remove the section"):
        load(base_config(folder, {"bits": 4}))


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_not_trained_themselves(
    stored: dict[str, Path], base_config: Callable[..., Any], kind: str
) -> None:
    with pytest.raises(ModelError, match=r"cannot be trained themselves. Add `adapter: qlora`"):
        load(base_config(stored[kind], adapter=None))
    unadapted = base_config(stored[kind], adapter=None, trainer=SimpleNamespace(type="none"))
    assert load(unadapted).is_quantized


@pytest.mark.parametrize(
    ("kind", "named"),
    [("nf4", "quantization_config is missing"), ("int8", "down_proj.SCB, for quantised weights")],
)
def test_config_json_that_does_not_say_so(
    stored: dict[str, Path], tmp_path: Path, base_config: Callable[..., Any], kind: str, named: str
) -> None:
    folder = with_settings(stored[kind], tmp_path / kind, None)
    with pytest.raises(ModelError, match=named):
        load(base_config(folder))


@pytest.mark.parametrize(("held", "said"), [("plain", "nf4"), ("plain", "int8"), ("nf4", "int8")])
def test_config_json_that_says_what_is_not_so(
    llama_folder: Path, stored: dict[str, Path], tmp_path: Path, base_config: Callable[..., Any], held: str, said: str
) -> None:
    source = llama_folder if held == "plain" else stored[held]
    folder = with_settings(source, tmp_path / "wrong", settings_of(stored[said]))
    with pytest.raises(ModelError, match=r"config.json says otherwise. Put its quantization_config right"):
        load(base_config(folder))


def test_weights_that_are_missing_are_an_error(
    llama_folder: Path, tmp_path: Path, base_config: Callable[..., Any]
) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(llama_folder, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    for section in (None, FLOAT8):
        with pytest.raises(ModelError, match=rf"lack 1 weights of the model, as {name}"):
            load(base_config(folder, section))
    with pytest.raises(ModelError, match="lack 1 weights"):
        load_merged_model(base_config(folder), str(folder), CPU)


def test_backend_of_a_loaded_base(base_config: Callable[..., Any]) -> None:
    assert quantization_backend(load(base_config())) is None
    assert quantization_backend(load(base_config(quantization={"bits": 8}))) == "bitsandbytes"
    assert quantization_backend(load(base_config(quantization=FLOAT8))) == "torchao"
