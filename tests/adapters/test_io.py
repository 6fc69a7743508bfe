"""Saving and loading adapters: bit-identical here, equal in plain PEFT, safetensors only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ludwig_peft_plugin.adapters.initial import METADATA_KEY
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.lora_init import METHODS
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig
from ludwig_peft_plugin.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VARIANTS: dict[str, Any] = {
    **{f"lora-{name}": (LoraConfig, {"init_lora_weights": name}) for name in METHODS if name != "loftq"},
    **{f"dora-{name}": (DoraConfig, {"init_lora_weights": name}) for name in ("random", "pissa", "eva", "olora")},
    "rslora-patterns-pissa": (
        LoraConfig,
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3.0},
        },
    ),
    "patterns-olora": (LoraConfig, {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}}),
    "replication": (LoraConfig, {"layer_replication": [[0, 2], [1, 3]]}),
    "tokens": (LoraConfig, {"trainable_token_indices": [3, 5]}),
    "modules": (LoraConfig, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "parameters": (LoraConfig, {"target_parameters": ["mlp.gate_proj.weight"]}),
    "embeddings": (LoraConfig, {"target_modules": ["embed_tokens", "lm_head"]}),
    "layers": (QLoraConfig, {"layers_to_transform": [0, 2]}),
}


def trained(tiny: Any, cls: Any, options: dict[str, Any], **base: Any) -> Any:
    model = tiny.attach(cls(**{"r": 4, "dropout": 0.0, **options}), tiny.base(**base))
    tiny.train(model)
    return model


def plain_peft(base: Any, folder: Any) -> Any:
    return PeftModel.from_pretrained(base, str(folder))


def check_round_trip(tiny: Any, model: Any, folder: Path, **base: Any) -> None:
    expected = tiny.logits(model)
    assert (expected - tiny.logits(tiny.base(**base))).abs().max() > 1e-3
    save_adapter(model, str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    for trainable in (True, False):
        loaded = load_adapter(tiny.base(**base), str(folder), trainable=trainable)
        assert torch.equal(tiny.logits(loaded), expected)
        trains = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trains == ({name for name, p in model.named_parameters() if p.requires_grad} if trainable else set())
    torch.testing.assert_close(tiny.logits(plain_peft(tiny.base(**base), folder)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_is_trained(tiny: Any, variant: str, tmp_path: Path) -> None:
    cls, options = VARIANTS[variant]
    check_round_trip(tiny, trained(tiny, cls, options), tmp_path / "adapter")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("init", ["random", "loftq"])
@pytest.mark.parametrize("cls", [LoraConfig, QLoraConfig, DoraConfig])
def test_loaded_is_trained_on_a_quantised_base(tiny: Any, cls: Any, init: str, bits: int, tmp_path: Path) -> None:
    model = trained(tiny, cls, {"init_lora_weights": init}, bits=bits)
    check_round_trip(tiny, model, tmp_path / "adapter", bits=bits)


def test_biases_are_saved(tiny: Any, tmp_path: Path) -> None:
    model = trained(tiny, LoraConfig, {"bias": "all"}, attention_bias=True)
    check_round_trip(tiny, model, tmp_path / "adapter", attention_bias=True)
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    del saved[next(name for name in saved if name.endswith("bias"))]
    save_file(saved, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(AdapterError, match="1 of its tensors are missing"):
        load_adapter(tiny.base(attention_bias=True), str(tmp_path / "adapter"), trainable=True)


# Soft prompts put places before the rows: see test_soft_prompts.py. BitFit needs biases and `full` has no adapter: see
# test_selective.py and test_full.py.
@pytest.mark.parametrize(
    "name",
    sorted(
        {name for name, cls in adapter_registry.items() if not getattr(cls, "soft_prompt", False)}
        - {"lora", "qlora", "dora", "bitfit", "full"}
    ),
)
def test_ludwigs_own_types_round_trip(tiny: Any, name: str, tmp_path: Path) -> None:
    small = {"c3a": {"block_size": 16}, "waveft": {"n_frequency": 32}, "vblora": {"vector_length": 16}}
    adapter = adapter_registry[name].model_validate({"type": name, **small.get(name, {})})
    model = tiny.attach(adapter)
    assert tiny.gradients(model)
    tiny.train(model)
    save_adapter(model, str(tmp_path / "adapter"))
    loaded = load_adapter(tiny.base(), str(tmp_path / "adapter"), trainable=True)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert (tiny.logits(model) - tiny.logits(tiny.base())).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_training_goes_on_as_if_it_had_not_stopped(tiny: Any, name: str, tmp_path: Path) -> None:
    whole = trained(tiny, LoraConfig, {"init_lora_weights": name})
    part = trained(tiny, LoraConfig, {"init_lora_weights": name})
    save_adapter(part, str(tmp_path))
    again = load_adapter(tiny.base(), str(tmp_path), trainable=True)
    for model in (whole, again):
        tiny.train(model)
    assert torch.equal(tiny.logits(again), tiny.logits(whole))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in whole.named_parameters())


def test_a_converted_adapter_is_an_ordinary_one_of_twice_the_rank(tiny: Any, tmp_path: Path) -> None:
    model = trained(tiny, LoraConfig, {"init_lora_weights": "pissa"})
    save_adapter(model, str(tmp_path))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert model.peft_config["default"].r == 4
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert METADATA_KEY in file.metadata()
        assert {file.get_slice(n).get_shape()[0] for n in file.keys() if "lora_A" in n} == {8}  # noqa: SIM118
    quantised = load_adapter(tiny.base(bits=4), str(tmp_path), trainable=False)
    assert quantised.peft_config["default"].r == 8
    reference = plain_peft(tiny.base(bits=4), tmp_path)
    torch.testing.assert_close(tiny.logits(quantised), tiny.logits(reference), rtol=0, atol=1e-6)


def test_a_model_that_carries_an_adapter_takes_another(tiny: Any, tmp_path: Path) -> None:
    one, other = trained(tiny, LoraConfig, {}), trained(tiny, DoraConfig, {})
    pissa = trained(tiny, LoraConfig, {"init_lora_weights": "pissa"})
    expected = {"other": tiny.logits(other), "pissa": tiny.logits(pissa)}
    for name, model in (("other", other), ("pissa", pissa)):
        save_adapter(model, str(tmp_path / name))
    replaced = load_adapter(one, str(tmp_path / "other"), trainable=True)
    assert torch.equal(tiny.logits(replaced), expected["other"])
    tiny.train(pissa)
    again = load_adapter(pissa, str(tmp_path / "pissa"), trainable=True)
    assert torch.equal(tiny.logits(again), expected["pissa"])
    with pytest.raises(AdapterError, match="changed by init_lora_weights: pissa of another adapter"):
        load_adapter(again, str(tmp_path / "other"), trainable=True)


def test_the_config_that_is_saved(tiny: Any, tmp_path: Path) -> None:
    save_adapter(trained(tiny, QLoraConfig, {}), str(tmp_path))
    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "llama"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tiny.folder()) not in text
    first = (tmp_path / WEIGHTS).read_bytes(), text
    save_adapter(trained(tiny, QLoraConfig, {}), str(tmp_path))
    assert ((tmp_path / WEIGHTS).read_bytes(), (tmp_path / CONFIG).read_text()) == first


def test_an_adapter_peft_saved(tiny: Any, tmp_path: Path) -> None:
    for init in (False, "pissa", "olora"):
        config = PeftLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj"], init_lora_weights=init)
        model = get_peft_model(tiny.base(), config)
        tiny.train(model)
        model.save_pretrained(str(tmp_path / str(init)))
        loaded = load_adapter(tiny.base(), str(tmp_path / str(init)), trainable=True)
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=0, atol=1e-5)
