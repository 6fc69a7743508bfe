"""Answers in slots equal transformers' own for every model type whose attention the engine knows."""

import pytest
import torch

from ludwig_peft_plugin.engine.transformers_attention import PLAIN_ATTENTION, supports_padding_free
from ludwig_peft_plugin.model.generation import generate_answers, slot_choice

CPU = torch.device("cpu")
WINDOW = {"sliding_window": 8}
WINDOWS = dict.fromkeys(("mistral", "mixtral", "phi3", "starcoder2", "cohere2", "gemma3_text", "olmo3"), WINDOW)
HALF = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
CHANGES = {
    **WINDOWS,
    "qwen2": HALF,
    "qwen3": HALF,
    "mixtral": WINDOW | EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt2": {"attn_pdrop": 0.0, "n_positions": 128, "activation_function": "gelu"},
}


@pytest.mark.parametrize("model_type", sorted(PLAIN_ATTENTION))
def test_answers_in_slots_are_transformers_own(model_type, make_model, prompts, settings, one_by_one):
    model = make_model(model_type, **CHANGES.get(model_type, {}))
    config = settings()
    # StableLM's attention does not go through transformers' interface: it generates in padded batches.
    assert (slot_choice(model, config, CPU) is not None) == supports_padding_free(model) == (model_type != "stablelm")
    made = generate_answers(model, prompts, config, device=CPU, batch_size=3)
    assert [answer.tokens.tolist() for answer in made] == one_by_one(model, prompts, config)
