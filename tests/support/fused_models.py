"""Small random models with adapters that matter, and the comparison of their fused layers with transformers' own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_batches import micro_batch
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
from ludwig_peft_plugin.engine.fused.layer import FusedForward
from ludwig_peft_plugin.engine.install import SWITCH, decoder_layers
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
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora of two layers": {"target_modules": ["q_proj", "down_proj"]},
    "rslora with ranks by layer": {"use_rslora": True, "rank_pattern": {"v_proj": 7, "up_proj": 3}},
    "dora": {"use_dora": True},
}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model, config, extra = FAMILIES[family]
    base = model(config(**SHAPE, **extra))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)  # at their initial 0 and 1 they would hide mistakes
    return base


def four_bit(folder: Path, family: str = "llama", *, double: bool = False) -> Any:
    """Return such a model with an NF4 base, which is written to `folder` first."""
    build(family).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )
    base = FAMILIES[family][0].from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base.requires_grad_(False)


def adapted(base: Any, **options: Any) -> Any:
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
    return micro_batch(lengths, ids=(0, SHAPE["vocab_size"]), seed=2)


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    result = target_loss(model, batch())
    (result.loss_sum / 7).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return float(result.loss_sum.detach()), gradients


def assert_equal(model: Any, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-3) -> None:
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
