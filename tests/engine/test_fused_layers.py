"""Fused layers give the loss and the gradients of transformers' layers with PEFT's adapters in them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.fused.layer import FusedForward, obstacle
from ludwig_peft_plugin.engine.install import SWITCH, decoder_layers
from ludwig_peft_plugin.model.float8 import Float8Linear
from ludwig_peft_plugin.training.loss import target_loss

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}
ADAPTERS = {
    "lora": {},
    "lora of two layers": {"target_modules": ["q_proj", "down_proj"]},
    "rslora with ranks by layer": {"use_rslora": True, "rank_pattern": {"v_proj": 7, "up_proj": 3}},
    "dora": {"use_dora": True},
}


def build(family: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    model, config, extra = FAMILIES[family]
    base = model(config(**SHAPE, **extra))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)  # at their initial 0 and 1 they would hide mistakes
    return base


def adapted(base: torch.nn.Module, **options: object) -> torch.nn.Module:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "init_lora_weights": False, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.mul_(2)
    return model


def batch(lengths: tuple[int, ...] = (7, 19, 4, 12)) -> MicroBatch:
    import numpy as np

    generator = torch.Generator().manual_seed(2)
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    input_ids = torch.randint(0, SHAPE["vocab_size"], (offsets[-1],), generator=generator)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.arange(offsets[-1])
    predicted = places[1:][owners[1:] == owners[:-1]]
    return MicroBatch(
        rows=np.arange(len(lengths)),
        input_ids=input_ids,
        position_ids=places - torch.tensor(offsets)[owners],
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        max_length=max(lengths),
        targets=input_ids[predicted],
        target_positions=predicted - 1,
        target_rows=owners[predicted],
        tokens=offsets[-1],
    )


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    result = target_loss(model, batch())
    (result.loss_sum / 7).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return float(result.loss_sum.detach()), gradients


def assert_equal(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-3) -> None:
    """Compare fused and plain layers of the same model; the adapter must matter, or equality would be trivial."""
    monkeypatch.setenv(SWITCH, "0")
    plain_model = copy.deepcopy(model)
    plain_loss, plain = loss_and_gradients(plain_model)
    assert not any(isinstance(getattr(layer, "forward", None), FusedForward) for layer in decoder_layers(plain_model))
    monkeypatch.setenv(SWITCH, "1")
    fused_loss, fused = loss_and_gradients(model)
    layers = decoder_layers(model)
    assert layers
    assert all(isinstance(layer.forward, FusedForward) and layer.forward._parts is not None for layer in layers)
    assert fused_loss == pytest.approx(plain_loss, rel=2e-5)
    assert fused.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert (fused[name] - gradient).norm() / gradient.norm() < tolerance, name
    with plain_model.disable_adapter(), torch.no_grad():
        assert float(target_loss(plain_model, batch()).loss_sum) != pytest.approx(plain_loss, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, monkeypatch):
    assert_equal(adapted(build(family)), monkeypatch)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, monkeypatch):
    assert_equal(adapted(build("llama with biases"), **ADAPTERS[adapter]), monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_gradient_checkpointing(adapter, monkeypatch):
    model = adapted(build(), **ADAPTERS[adapter])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_equal(model, monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bit_base(adapter, double, monkeypatch, tmp_path):
    build().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    assert_equal(adapted(base, **ADAPTERS[adapter]), monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_float8_base(adapter, monkeypatch):
    base = build("llama with biases").requires_grad_(False)
    for name, layer in list(base.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            base.set_submodule(name, Float8Linear.from_linear(layer))
    assert_equal(adapted(base, **ADAPTERS[adapter]), monkeypatch)


def test_dropout_is_the_same_in_both_passes_and_has_the_right_mean(monkeypatch):
    """The loss along the gradient's direction changes as the gradient says, with the masks held by the seed."""
    model = adapted(build(), lora_dropout=0.3).train().double()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return target_loss(model, batch()).loss_sum

    value = loss()
    value.backward()
    assert float(loss().detach()) == pytest.approx(float(value.detach()), rel=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [p.grad / p.grad.norm() for p in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    step, moved = 3e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.add_(sign * step * direction)
            moved.append(float(loss().detach()))
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.sub_(sign * step * direction)
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)
    torch.manual_seed(6)
    assert float(target_loss(model, batch()).loss_sum.detach()) != pytest.approx(float(value.detach()), rel=1e-6)


def test_layers_follow_the_state_of_the_adapter():
    model = adapted(build())
    with torch.no_grad():
        trained = float(target_loss(model, batch()).loss_sum)
        with model.disable_adapter():
            base = float(target_loss(model, batch()).loss_sum)
        assert float(target_loss(model, batch()).loss_sum) == trained
        model.merge_adapter()
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
        model.unmerge_adapter()
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
        merged = model.merge_and_unload()
        assert float(target_loss(merged, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
    assert base != pytest.approx(trained, rel=1e-3)


def test_generation_is_transformers_own_after_training_forwards():
    model = adapted(build()).eval()
    ids = torch.randint(0, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(input_ids=ids, attention_mask=mask, **settings)
    target_loss(model, batch())
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": "all"}, "trained itself"),
        ({"modules_to_save": ["input_layernorm"]}, "more than LoRA"),
        ({"use_dora": True, "lora_dropout": 0.1}, "DoRA with dropout"),
        ({"lora_bias": True}, "biases"),
    ],
)
def test_what_cannot_be_fused_runs_plainly_and_right(options, reason, monkeypatch):
    model = adapted(build("llama with biases"), **options).eval()
    assert reason in str(obstacle(decoder_layers(model)[0], torch.float32))
    loss, gradients = loss_and_gradients(model)
    monkeypatch.setenv(SWITCH, "0")
    plain = copy.deepcopy(model)
    for layer in decoder_layers(plain):
        layer.__dict__.pop("forward", None)
    assert loss_and_gradients(plain)[0] == pytest.approx(loss, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_second_backward_pass_is_refused():
    loss = target_loss(adapted(build()), batch()).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        loss.backward()
