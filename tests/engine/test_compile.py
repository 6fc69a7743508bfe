"""`trainer.compile` takes the layers that have no fused kernels, and says so when there are none."""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.engine.compile import compile_layers
from ludwig_peft_plugin.engine.fused.layer import FusedForward
from ludwig_peft_plugin.engine.install import SWITCH, prepare


@pytest.fixture
def llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).requires_grad_(False)


def compiled(model: torch.nn.Module) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


def test_fused_layers_leave_nothing_to_compile(llama, caplog):
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin.engine.compile"):
        assert compile_layers(llama) == 0
    assert compiled(llama) == 0
    assert "nothing is left to compile" in caplog.text


def test_layers_that_are_not_fused_are_compiled_and_stay_transformers_own(llama, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    assert compile_layers(llama) == compiled(llama) == 3
    monkeypatch.setenv(SWITCH, "1")
    prepare(llama)
    assert not any(isinstance(layer.__dict__.get("forward"), FusedForward) for layer in llama.model.layers)


def test_other_architectures():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    assert compile_layers(model) == compiled(model) == 2
