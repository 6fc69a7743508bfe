"""Attaching: what trains and what stays, and a clear error for each option that this base cannot have."""

import logging
from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.io import save_adapter
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig
from ludwig_peft_plugin.errors import AdapterError

ALL = (LoraConfig, QLoraConfig, DoraConfig)
BASES = (None, 4, 8)


@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("cls", ALL)
def test_only_the_adapter_trains(tiny: Any, cls: Any, bits: int | None) -> None:
    model = tiny.attach(cls(r=4, init_lora_weights="random"), tiny.base(bits=bits))
    gradients = tiny.gradients(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trainable
    assert all(".lora_" in name for name in trainable)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trainable)


@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("cls", ALL)
def test_frozen_weights_do_not_change(tiny: Any, cls: Any, bits: int | None) -> None:
    model = tiny.attach(cls(r=4), tiny.base(bits=bits))
    before, logits = tiny.weights(model), tiny.logits(model)
    tiny.train(model)
    after = tiny.weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tiny.logits(model) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("cls", ALL)
def test_a_new_adapter_is_the_base(tiny: Any, cls: Any, bits: int | None) -> None:
    model = tiny.attach(cls(), tiny.base(bits=bits))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.base(bits=bits)), rtol=0, atol=2e-6)


def test_a_base_that_was_not_frozen_is(tiny: Any) -> None:
    base = tiny.base().requires_grad_(True)
    assert all(".lora_" in name for name in tiny.gradients(tiny.attach(LoraConfig(), base)))


def test_adapter_weights_are_float32_over_a_16_bit_base(tiny: Any) -> None:
    for name in ("default", "orthogonal", "pissa", "eva", "lora_ga"):
        for cls in (LoraConfig, DoraConfig):
            model = tiny.attach(cls(r=4, init_lora_weights=name), tiny.base(dtype=torch.bfloat16))
            types = {p.requires_grad: p.dtype for p in model.parameters()}
            assert types == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": ["q_prj"]}, ["no module is called q_prj", "Did you mean q_proj?", "gate_proj", "lm_head"]),
        ({"target_modules": ["q_proj", "wq"]}, ["no module is called wq", "all-linear"]),
        ({"target_modules": "q_proj"}, ["regular expression 'q_proj'", "write [q_proj]"]),
        ({"target_modules": r".*\.wq"}, ["matches no full module name", "model.layers.0.self_attn.q_proj"]),
        ({"target_modules": ["self_attn"]}, ["LlamaAttention", "not a linear or embedding layer", "q_proj"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}, ["exclude_modules: 'k_proj'"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["leave no module"]),
        ({"exclude_modules": r".*\.9\..*"}, ["exclude_modules", "matches none"]),
        ({"layers_to_transform": [0, 3]}, ["layers_to_transform: layer 3", "3 layers, 0 to 2"]),
        ({"layers_to_transform": 7}, ["layers_to_transform: layer 7"]),
        (
            {"layers_to_transform": 1, "target_modules": ["model.layers.0.self_attn.q_proj"]},
            ["layers_to_transform has no effect on target_modules that are full names"],
        ),
        ({"rank_pattern": {"q_prj": 4}}, ["rank_pattern: 'q_prj'", "Did you mean q_proj?"]),
        ({"rank_pattern": {"k_proj": 4}}, ["rank_pattern: 'k_proj' matches no module that gets an adapter"]),
        ({"alpha_pattern": {r"layers\.9\..*": 4}}, ["alpha_pattern"]),
        ({"rank_pattern": {"(": 4}}, ["rank_pattern", "not a regular expression"]),
        ({"modules_to_save": ["lm_hed"]}, ["modules_to_save: no module is called 'lm_hed'", "lm_head"]),
        ({"modules_to_save": ["head"]}, ["modules_to_save: no module is called 'head'"]),
        ({"trainable_token_indices": [96]}, ["token 96 does not exist", "0 to 95"]),
        ({"trainable_token_indices": {"wte": [1]}}, ["no embedding is called 'wte'", "embed_tokens"]),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            ["trainable_token_indices has no effect", "embed_tokens"],
        ),
        ({"target_parameters": ["gate.weight"], "dropout": 0.0}, ["target_parameters: no parameter", "embed_tokens"]),
        ({"bias": "all"}, ["bias_type: all has nothing to train", "this model has no bias"]),
        ({"bias": "lora_only"}, ["bias_type: lora_only has nothing to train", "the adapted modules have no bias"]),
        ({"layer_replication": [[0, 4]]}, ["layer_replication: [0, 4]", "at most 3"]),
        ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, ["ensure_weight_tying"]),
    ],
)
def test_options_that_cannot_take_effect(tiny: Any, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(AdapterError) as caught:
        tiny.attach(LoraConfig(**options))
    text = str(caught.value)
    assert text.startswith("adapter")
    assert all(part in text for part in parts), text
    assert len(text) < 500


def test_an_architecture_peft_does_not_know(tiny: Any) -> None:
    base = tiny.base()
    base.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match=r"no default for the architecture 'brand_new'.*q_proj.*all-linear"):
        tiny.attach(LoraConfig(), base)
    base = tiny.base()
    base.config.model_type = "brand_new"
    assert len(tiny.layers_of(tiny.attach(LoraConfig(target_modules="all-linear"), base))) == 7 * tiny.layers


def test_quantised_modules_cannot_be_trained_in_full(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="modules_to_save: 'q_proj' is quantised"):
        tiny.attach(LoraConfig(target_modules=["k_proj"], modules_to_save=["q_proj"]), tiny.base(bits=4))
    with pytest.raises(AdapterError, match=r"target_parameters: .* is quantised"):
        tiny.attach(LoraConfig(target_parameters=["q_proj.weight"], dropout=0.0), tiny.base(bits=4))
    trained = tiny.gradients(tiny.attach(LoraConfig(modules_to_save=["lm_head"]), tiny.base(bits=4)))
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trained


@pytest.mark.parametrize("bits", [4, 8])
def test_types_that_do_not_say_so_are_refused_on_a_quantised_base(tiny: Any, bits: int) -> None:
    adapter = adapter_registry["frod"].model_validate({"type": "frod"})
    with pytest.raises(AdapterError, match=r"adapter.type: frod does not work on a quantised base, because it keeps"):
        tiny.attach(adapter, tiny.base(bits=bits))


def test_peft_refusals_name_the_reason(tiny: Any) -> None:
    from peft import VBLoRAConfig

    from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft

    with pytest.raises(AdapterError, match=r"PEFT cannot build it on this model: .*vector_length"):
        wrap_with_peft(tiny.base(), VBLoRAConfig(target_modules=["q_proj"], vector_length=48))


def test_the_base_name_is_never_a_path_of_this_machine(tiny: Any) -> None:
    base = tiny.base()
    assert base.name_or_path.startswith("/")
    name = tiny.attach(LoraConfig(), base).peft_config["default"].base_model_name_or_path
    assert name == "llama"
    base = tiny.base()
    base.name_or_path = "meta-llama/Llama-3.1-8B"
    assert tiny.attach(LoraConfig(), base).peft_config["default"].base_model_name_or_path == base.name_or_path


def test_a_base_changed_by_an_earlier_adapter_is_refused(tiny: Any) -> None:
    base = tiny.attach(LoraConfig(init_lora_weights="pissa")).unload()
    with pytest.raises(AdapterError, match="changed by init_lora_weights: pissa of an earlier adapter"):
        attach_adapter(base, LoraConfig())


def test_merge_obstacles(tiny: Any) -> None:
    assert LoraConfig().merge_obstacle(tiny.base()) is None
    assert "layer_replication" in str(LoraConfig(layer_replication=[[0, 2]]).merge_obstacle(tiny.base()))
    assert "lora_bias" in str(LoraConfig(lora_bias=True).merge_obstacle(tiny.base()))


@pytest.mark.parametrize("cls", ALL)
def test_training_goes_on_from_a_trained_adapter(tiny: Any, cls: Any, tmp_path: Any) -> None:
    first = tiny.attach(cls(r=4, dropout=0.0))
    tiny.train(first)
    save_adapter(first, str(tmp_path))
    second = tiny.attach(cls(pretrained_adapter_weights=str(tmp_path)))
    assert torch.equal(tiny.logits(second), tiny.logits(first))
    assert all(".lora_" in name for name in tiny.gradients(second))
    before = tiny.logits(second)
    tiny.train(second)
    assert (tiny.logits(second) - before).abs().max() > 1e-3


def test_a_trained_adapter_of_another_type_is_refused(tiny: Any, tmp_path: Any) -> None:
    save_adapter(tiny.attach(LoraConfig()), str(tmp_path / "lora"))
    save_adapter(tiny.attach(adapter_registry["ia3"].model_validate({"type": "ia3"})), str(tmp_path / "ia3"))
    with pytest.raises(AdapterError, match="is a IA3 adapter, not one of type lora"):
        tiny.attach(LoraConfig(pretrained_adapter_weights=str(tmp_path / "ia3")))
    with pytest.raises(AdapterError, match="is a LoRA adapter, not a DoRA one"):
        tiny.attach(DoraConfig(pretrained_adapter_weights=str(tmp_path / "lora")))


def test_options_the_folder_decides_otherwise_are_said(
    tiny: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(tiny.attach(LoraConfig(r=4)), str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="ludwig_peft_plugin"):
        model = tiny.attach(LoraConfig(r=32, pretrained_adapter_weights=str(tmp_path)))
    assert model.peft_config["default"].r == 4
    assert "decides r: it is 4 there, 32 in the config" in caplog.text
    assert "dropout" not in caplog.text
