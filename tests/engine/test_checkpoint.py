"""A checkpointed model gives the same loss and gradients as one that keeps everything, and keeps only layer inputs."""

import copy
import gc
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import checkpointable_layers, enable_checkpointing
from ludwig_peft_plugin.engine.forward import target_states, unwrapped
from ludwig_peft_plugin.engine.fused.layer import FusedForward
from ludwig_peft_plugin.engine.install import SWITCH
from ludwig_peft_plugin.engine.replay import draws_random_numbers
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.training.loss import target_loss

LAYERS = 4
HIDDEN = 32
SHAPE = {
    "vocab_size": 53,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 53, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "gpt2 with dropout": (GPT2LMHeadModel, GPT2Config(**GPT2)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
}
ADAPTERS = {
    "lora": {},
    "lora with dropout": {"lora_dropout": 0.4},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.4},
}


def build(family: str = "llama", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    base = kind(copy.deepcopy(config)).requires_grad_(False)
    settings = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **options}
    if "gpt2" in family:
        settings["fan_in_fan_out"] = True
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def batch(lengths: tuple[int, ...] = (7, 12, 4), seed: int = 2) -> MicroBatch:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(offsets[-1])
    input_ids = torch.randint(0, 53, (tokens,), generator=torch.Generator().manual_seed(seed))
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.arange(tokens)
    predicted = places[1:][owners[1:] == owners[:-1]]
    return MicroBatch(
        rows=np.arange(len(lengths)),
        input_ids=input_ids,
        position_ids=places - offsets[owners],
        cu_seqlens=offsets.int(),
        max_length=max(lengths),
        targets=input_ids[predicted],
        target_positions=predicted - 1,
        target_rows=owners[predicted],
        tokens=tokens,
    )


def step(model: torch.nn.Module, *batches: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the accumulated gradients of an optimiser step over the micro-batches."""
    torch.manual_seed(3)
    model.zero_grad()
    total = torch.zeros(())
    for part in batches or (batch(),):
        loss = target_loss(model, part).loss_sum
        (loss / 10).backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(result: tuple, expected: tuple) -> None:
    assert torch.equal(result[0], expected[0])
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert torch.equal(result[1][name], gradient), name


def checkpointed(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    model = copy.deepcopy(model)
    enable_checkpointing(model, **options)
    return model


def uses_own_checkpoint(loss: torch.Tensor) -> int:
    """Return how many of our checkpoints are in the graph of a loss."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum("_Checkpointed" in node.name() for node in seen)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_without(family, adapter):
    model = build(family, **ADAPTERS[adapter])
    other = checkpointed(model)
    assert_same(step(other), step(model))
    assert uses_own_checkpoint(target_loss(other, batch()).loss_sum) == LAYERS
    fused = [isinstance(layer.forward, FusedForward) for layer in checkpointable_layers(unwrapped(other))]
    assert fused == ["gpt2" not in family] * LAYERS


def test_layers_as_transformers_wrote_them(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    model = build(lora_dropout=0.4)
    assert_same(step(checkpointed(model)), step(model))


@pytest.mark.parametrize("layers", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_any_share_of_the_layers(layers):
    model = build()
    other = checkpointed(model, layers=layers)
    assert_same(step(other), step(model))
    on = [layer.gradient_checkpointing for layer in checkpointable_layers(unwrapped(other))]
    count = max(1, round(layers * LAYERS))
    assert on == [True] * count + [False] * (LAYERS - count)
    assert uses_own_checkpoint(target_loss(other, batch()).loss_sum) == count


@pytest.mark.parametrize("adapter", ["lora", "lora with dropout"])
def test_accumulation_over_micro_batches_of_other_lengths(adapter):
    model = build(**ADAPTERS[adapter])
    parts = [batch(), batch((20, 3), seed=4), batch((2,), seed=5)]
    assert_same(step(checkpointed(model), *parts), step(model, *parts))


def test_inputs_that_require_gradients():
    model = build()
    other = checkpointed(model)
    expected = step(model)
    other.enable_input_require_grads()
    assert_same(step(other), expected)


def test_a_trained_embedding_gets_its_gradient():
    model = build(modules_to_save=["embed_tokens"])
    assert any("embed_tokens" in name for name in step(model)[1])
    assert_same(step(checkpointed(model)), step(model))


def test_first_layers_without_an_adapter_are_not_run_again():
    model = build(target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
    other = checkpointed(model)
    assert_same(step(other), step(model))
    assert uses_own_checkpoint(target_loss(other, batch()).loss_sum) == 2


def test_an_adapter_attached_afterwards_is_trained():
    plain = build(lora_dropout=0.4)
    torch.manual_seed(0)
    base = LlamaForCausalLM(copy.deepcopy(FAMILIES["llama"][1])).requires_grad_(False).train()
    enable_checkpointing(base)
    with torch.no_grad():
        target_loss(base, batch())
    later = get_peft_model(base, plain.peft_config["default"]).train()
    later.load_state_dict(plain.state_dict())
    assert_same(step(later), step(plain))


def tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def test_only_the_inputs_of_layers_are_kept():
    """Count what autograd saves, and what else is alive, after the forward pass of the decoder layers."""
    model = build()
    unwrapped(model).model.norm = nn.Identity()
    part = batch((40, 23))
    size = 63 * HIDDEN * 4

    def kept(model: torch.nn.Module) -> tuple[list[torch.Size], int]:
        target_states(model, part)
        gc.collect()
        before = {id(tensor) for tensor in tensors()}
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            states = target_states(model, part)
        gc.collect()
        alive = [tensor for tensor in tensors() if id(tensor) not in before]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*alive, *saved)}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert states.requires_grad
        return [t.shape for t in saved], sum(n for place, n in storages.items() if place not in parameters)

    shapes, all_layers = kept(checkpointed(model))
    assert shapes == [torch.Size([1, 63, HIDDEN])] * LAYERS
    assert LAYERS * size <= all_layers < (LAYERS + 2.5) * size  # with the output, the angles and the ids
    memory = [all_layers, *(kept(checkpointed(model, layers=share))[1] for share in (0.75, 0.5, 0.25)), kept(model)[1]]
    assert all(after - before > 6 * size for before, after in pairwise(memory))


def test_evaluation_checkpoints_nothing():
    model = checkpointed(build())
    model.eval()
    assert uses_own_checkpoint(target_loss(model, batch()).loss_sum) == 0


def test_generation_is_unchanged():
    model = build().eval()
    ids = torch.randint(0, 53, (2, 5))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    other = checkpointed(model)
    step(other.train())
    other.eval()
    assert torch.equal(other.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), expected)


def test_no_gradient_is_made_for_a_frozen_embedding():
    model = checkpointed(build())
    needed: list[bool] = []
    for layer in checkpointable_layers(unwrapped(model)):
        layer.register_forward_pre_hook(lambda _, inputs: needed.append(inputs[0].requires_grad))
    loss = target_loss(model, batch()).loss_sum
    needed.clear()
    loss.backward()
    assert needed == [True] * (LAYERS - 1) + [False]  # from the last layer to the first


def test_a_second_backward_pass_gives_the_same_again():
    model = checkpointed(build())
    loss = target_loss(model, batch()).loss_sum
    gradients = []
    for keep in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=keep)
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_which_layers_could_not_be_recorded():
    fused, plain = build(lora_dropout=0.4), build("gpt2")
    target_loss(fused, batch())
    assert not draws_random_numbers(checkpointable_layers(unwrapped(fused))[0], torch.float32)
    assert not draws_random_numbers(checkpointable_layers(unwrapped(plain))[0], torch.float32)
    for model in (build("gpt2 with dropout"), build("gpt2", lora_dropout=0.1)):
        assert draws_random_numbers(checkpointable_layers(unwrapped(model))[0], torch.float32)
    attention = SimpleNamespace(attention_dropout=0.1)
    layer = nn.Linear(2, 2)
    vars(layer).update(vars(attention))
    assert draws_random_numbers(layer, torch.float32)


@pytest.mark.parametrize("layers", [0, -0.5, 1.5])
def test_shares_that_are_none(layers):
    with pytest.raises(ModelError, match="checkpoint_layers"):
        enable_checkpointing(build(), layers=layers)


def test_offloading_needs_a_gpu():
    with pytest.raises(ModelError, match=r"checkpoint_offload.*'cpu'"):
        enable_checkpointing(build(), offload=True)
