"""PEFT's methods on bases: quantised ones as their dequantised selves, exact folders, sizes that fit or errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from disturbed import disturbed
from ludwig.schema.llms.peft import adapter_registry
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.peft_method import PeftMethod
from ludwig_peft_plugin.adapters.quantized_view import PlainView, remove_views
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.export.merge import merged_copy
from ludwig_peft_plugin.model.dequantize import dequantize_model, weight_only_forward

TYPES = {name: cls for name, cls in adapter_registry.items() if issubclass(cls, PeftMethod)}
QUANTIZED = [name for name, cls in TYPES.items() if cls.quantized_base]


def section(name: str, **given: Any) -> Any:
    return adapter_registry[name](**given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", QUANTIZED)
def test_on_a_quantised_base_it_is_what_it_is_on_the_dequantised_one(tiny: Any, name: str, bits: int) -> None:
    plain = tiny.attach(section(name), dequantize_model(tiny.base(bits=bits)))
    model = tiny.attach(section(name), tiny.base(bits=bits))
    mine, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain))
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.allclose(value, theirs[key], atol=1e-6), key
        value.data = theirs[key].data.clone()
    disturbed(model, 0.05)
    disturbed(plain, 0.05)
    with weight_only_forward(model):
        assert torch.allclose(tiny.logits(model), tiny.logits(plain), atol=1e-4)
        gradients, expected = tiny.gradients(model), tiny.gradients(plain)
    assert gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[key], expected[key], atol=1e-4) for key in gradients)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", TYPES)
def test_folder_is_exact_whatever_the_seed(tiny: Any, name: str, bits: int | None, tmp_path: Any) -> None:
    if bits and name not in QUANTIZED:
        with pytest.raises(AdapterError, match=TYPES[name].quantized_reason):
            tiny.attach(section(name), tiny.base(bits=bits))
        return
    model = tiny.attach(section(name), tiny.base(bits=bits))
    disturbed(model, 0.05)
    expected = tiny.logits(model)
    save_adapter(model, str(tmp_path))
    torch.manual_seed(1234)
    loaded = load_adapter(tiny.base(bits=bits), str(tmp_path), trainable=True)
    assert torch.equal(tiny.logits(loaded), expected)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert names[0] == names[1]
    assert all(p.dtype == torch.float32 for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name, cls in TYPES.items() if cls.mergeable and name != "beft"])
def test_merged_copy_of_a_quantised_base_is_the_model(tiny: Any, name: str) -> None:
    model = tiny.attach(section(name), tiny.base(bits=4 if name in QUANTIZED else None))
    disturbed(model, 0.05)
    merged = merged_copy(model, torch.float32)
    with weight_only_forward(model):
        assert torch.allclose(tiny.logits(merged), tiny.logits(model), rtol=1e-4, atol=1e-4)


def test_views_go_with_the_adapter_and_keep_the_base_as_it_is(tiny: Any) -> None:
    base = tiny.base(bits=4)
    layers = {n: m for n, m in base.named_modules() if type(m).__name__ == "Linear4bit"}
    before, names = tiny.logits(base), {n for n, _ in base.named_parameters()}
    model = tiny.attach(section("loha"), base)
    views = [m for m in model.modules() if isinstance(m, PlainView)]
    assert len(views) == len(layers) == 21
    assert views[0].weight.shape == (views[0].out_features, views[0].in_features)
    with pytest.raises(AttributeError):
        views[0].weight = torch.zeros(1)
    with pytest.raises(AdapterError, match="cannot be merged into a quantised layer in place"):
        model.merge_adapter()
    plain = model.unload()
    remove_views(plain)
    assert {n: m for n, m in plain.named_modules() if type(m).__name__ == "Linear4bit"} == layers
    assert {n for n, _ in plain.named_parameters()} == names
    assert torch.equal(tiny.logits(plain), before)


@pytest.mark.parametrize("bits", [None, 4])
def test_trained_biases_are_saved_and_merged(tiny: Any, tmp_path: Any, bits: int | None) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=tiny.vocabulary, num_key_value_heads=2, **shape))
    qwen.save_pretrained(tmp_path / "qwen")

    def base() -> Any:
        settings = tiny.base(bits=4).config.quantization_config if bits else None
        extra = {"quantization_config": settings} if bits else {}
        return Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen", **extra).requires_grad_(False).eval()

    model = attach_adapter(base(), section("hra", bias="hra_only", target_modules=["q_proj", "v_proj"]))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(trained) == 4
    disturbed(model, 0.05)
    save_adapter(model, str(tmp_path / "adapter"))
    loaded = load_adapter(base(), str(tmp_path / "adapter"), trainable=False)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    with weight_only_forward(model):
        assert torch.allclose(tiny.logits(merged_copy(model, torch.float32)), tiny.logits(model), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("c3a", {"block_size": 48}, "48 does not divide the 64 inputs and outputs of"),
        ("oft", {"oft_block_size": 48}, "48 does not divide the 64 inputs of"),
        ("boft", {"boft_block_size": 6}, "6 does not divide the 64 inputs of"),
        ("boft", {"boft_block_size": 16, "boft_n_butterfly_factor": 4}, "adapter.boft_n_butterfly_factor"),
        ("road", {"group_size": 48}, "these would do: 2, 4, 8, 16, 32"),
        ("vblora", {"vector_length": 40}, "adapter.vector_length: 40"),
        ("gralora", {"gralora_k": 3, "r": 9}, "adapter.gralora_k: 3 does not divide"),
        ("miss", {"r": 65}, "adapter.r: 65 is more than the 64 inputs"),
        ("miss", {"r": 48, "init_weights": "bat"}, "48 does not divide"),
        ("psoft", {"r": 33}, "adapter.r: 33 is more than the 32 singular values"),
        ("tinylora", {"r": 33}, "adapter.r: 33 is more than the 32 singular values"),
        ("shira", {"r": 30}, "asks for more entries than"),
        ("fourierft", {"n_frequency": 3000}, "3000 is more than the 2048 coefficients"),
        ("waveft", {"n_frequency_pattern": {"k_proj": 3000}}, "n_frequency_pattern.k_proj: 3000"),
        ("loha", {"rank_pattern": {"kproj": 3}}, "adapter.rank_pattern: 'kproj' matches no module"),
        ("loha", {"target_modules": ["q_prj"]}, "no module is called q_prj. Did you mean q_proj"),
        ("loha", {"target_modules": ["input_layernorm"]}, "which is not a linear or embedding layer"),
        ("loha", {"layers_to_transform": [7]}, "layer 7 selects no module"),
        ("loha", {"exclude_modules": ["xyz"]}, "'xyz' matches none of the modules"),
        ("loha", {"modules_to_save": ["head"]}, "no module is called 'head'"),
        ("vera", {"bias": "vera_only"}, "adapter.bias: vera_only has nothing to train"),
        ("ia3", {"target_modules": ["k_proj"], "feedforward_modules": ["up_proj"]}, "is not among the adapted modules"),
    ],
)
def test_what_does_not_fit_is_named(tiny: Any, name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as error:
        tiny.attach(section(name, **given))
    assert message in str(error.value)


def test_sizes_are_chosen_to_fit(tiny: Any) -> None:
    base = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
    for name, field_name, size in [
        ("c3a", "block_size", 16),
        ("oft", "oft_block_size", 32),
        ("boft", "boft_block_size", 4),
        ("road", "group_size", 16),
        ("vblora", "vector_length", 16),
    ]:
        model = tiny.attach(section(name), tiny.base(**base))
        assert getattr(model.peft_config["default"], field_name) == size, name


def test_ia3_finds_the_feed_forward_modules(tiny: Any) -> None:
    model = tiny.attach(section("ia3"))
    config = model.peft_config["default"]
    assert {name.rsplit(".", 1)[-1] for name in config.target_modules} == {"k_proj", "v_proj", "down_proj"}
    assert {name.rsplit(".", 1)[-1] for name in config.feedforward_modules} == {"down_proj"}
    everything = tiny.attach(section("ia3", target_modules="all-linear")).peft_config["default"]
    assert {name.rsplit(".", 1)[-1] for name in everything.feedforward_modules} == {"down_proj"}


def test_null_targets_are_pefts_for_the_architecture(tiny: Any) -> None:
    config = tiny.attach(section("vera", target_modules=None)).peft_config["default"]
    assert set(config.target_modules) == {"q_proj", "v_proj"}


@pytest.fixture
def gpt2(tiny: Any) -> Any:
    """A small base whose linear layers are `Conv1D`."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=tiny.vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    return base.requires_grad_(False).eval()


@pytest.mark.parametrize("name", ["vera", "fourierft", "ia3"])
def test_conv1d_of_gpt2(name: str, gpt2: Any, tiny: Any) -> None:
    model = attach_adapter(gpt2, section(name))
    disturbed(model, 0.05)
    assert torch.allclose(tiny.logits(merged_copy(model, torch.float32)), tiny.logits(model), rtol=1e-4, atol=1e-4)


def test_a_method_without_layers_for_conv1d_says_so(gpt2: Any) -> None:
    with pytest.raises(AdapterError, match="Conv1D"):
        attach_adapter(gpt2, section("loha"))


def test_lily_routes_each_token_by_itself(tiny: Any, tmp_path: Any) -> None:
    model = tiny.attach(section("lily", stride_A=2, num_B=3))
    disturbed(model, 0.05)
    whole = tiny.logits(model)[1:2, :10]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=tiny.ids[1:2, :10]).logits, whole, atol=1e-5)
    layers = [m for n, m in model.named_modules() if n.endswith("q_proj") and hasattr(m, "lily_A")]
    assert layers[0].lily_A["default"] is layers[1].lily_A["default"]
    assert layers[1].lily_A["default"] is not layers[2].lily_A["default"]
    assert layers[0].lily_B["default"] is layers[2].lily_B["default"]
    save_adapter(model, str(tmp_path))
    with_peft_alone = PeftModel.from_pretrained(tiny.base(), str(tmp_path))
    assert torch.equal(tiny.logits(with_peft_alone), tiny.logits(model))
