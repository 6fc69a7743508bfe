"""Layers that are multiplied as one: their gradients are those of layers apart, and their weights stay their own."""

import copy
import gc
import weakref

import pytest
import torch
from fused_models import adapted, assert_equal, batch, build, four_bit, loss_and_gradients
from safetensors.torch import load_file, save_file

from ludwig_peft_plugin.engine.columns import are_columns, empty_columns, side_by_side
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.fused import adapted_stack, diagonal
from ludwig_peft_plugin.engine.fused.stack import StackedFourBit
from ludwig_peft_plugin.engine.install import decoder_layers
from ludwig_peft_plugin.export.merge import merged_copy
from ludwig_peft_plugin.training.loss import target_loss

TARGETS = {
    "one rank": ({}, (True, True)),
    "scalings by layer": ({"alpha_pattern": {"v_proj": 3, "gate_proj": 40}}, (True, True)),
    "ranks by layer": ({"rank_pattern": {"k_proj": 7, "up_proj": 3}}, (False, False)),
    "queries and values": ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, (True, False)),
    "keys and up": ({"target_modules": ["k_proj", "up_proj"], "use_rslora": True}, (True, True)),
    "queries and keys, of two ranks": (
        {"target_modules": ["q_proj", "k_proj", "gate_proj"], "rank_pattern": {"q_proj": 2}},
        (False, True),
    ),
}
"""Options of LoRA, and whether the B of q, k, v and of gate and up are one block-diagonal matrix."""


def stacks(model):
    """Return the stacks of q, k, v and of gate and up, of every layer."""
    parts = [layer.forward._parts for layer in decoder_layers(model)]
    return [stack for part in parts for stack in (part.attention.group.stack, part.feed_forward.gate_up.stack)]


def bases(model, *names):
    """Return frozen layers of the first decoder layer."""
    first = decoder_layers(model)[0]
    found = [getattr(first.self_attn, name, None) or getattr(first.mlp, name) for name in names]
    return [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in found]


def frozen_bytes(model):
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def assert_same(results, expected, tolerance=1e-5):
    assert results[0] == pytest.approx(expected[0], rel=tolerance)
    assert results[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (results[1][name] - gradient).norm() / gradient.norm() < 10 * tolerance, name


def by_layers_apart(model, monkeypatch):
    """Return what a copy of the model gives whose layers are multiplied one by one."""
    twin = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr("ludwig_peft_plugin.engine.fused.group.stacked", lambda *_: None)
        torch.manual_seed(5)
        results = loss_and_gradients(twin)
    assert not any(stacks(twin))
    return results


@pytest.mark.parametrize("family", ["llama with biases", "qwen2"])
@pytest.mark.parametrize("targets", TARGETS)
def test_gradients(family, targets, monkeypatch):
    options, together = TARGETS[targets]
    model = adapted(build(family), **options)
    assert_equal(model, monkeypatch)
    assert [stack.blocks is not None for stack in stacks(model)] == 2 * list(together)


def test_gradients_at_ranks_too_high_for_zeros(monkeypatch):
    monkeypatch.setattr(diagonal, "MOST_RANKS", 11)  # three of rank 4 are more, two are less
    model = adapted(build("qwen2"))
    assert_equal(model, monkeypatch)
    assert [stack.blocks is not None for stack in stacks(model)] == 2 * [False, True]


@pytest.mark.parametrize("targets", ["one rank", "ranks by layer"])
def test_four_bit_layers(targets, monkeypatch, tmp_path):
    model = adapted(four_bit(tmp_path, "qwen2"), **TARGETS[targets][0])
    assert_equal(model, monkeypatch)
    assert all(isinstance(stack.stack, StackedFourBit) for stack in stacks(model))


def test_dropout_between_input_and_adapter(monkeypatch):
    """With the masks repeated by the seed, stacked layers give what layers apart give."""
    model = adapted(build("llama with biases"), lora_dropout=0.3).train()
    expected = by_layers_apart(model, monkeypatch)
    torch.manual_seed(5)
    assert_same(loss_and_gradients(model), expected)
    assert all(stack.blocks is not None for stack in stacks(model))


def test_dora_is_left_apart(monkeypatch):
    model = adapted(build(), use_dora=True)
    assert_equal(model, monkeypatch)
    assert stacks(model) == [None] * 4


def test_layers_of_one_adapter_off_are_stacked_too():
    model = adapted(build())
    with model.disable_adapter(), torch.no_grad():
        expected = float(target_loss(copy.deepcopy(model).unload(), batch()).loss_sum)
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(expected, rel=1e-6)
        assert all(stack is not None and not stack.b for stack in stacks(model))


def test_gradients_of_outputs_are_not_copied(monkeypatch):
    model = adapted(build())
    copied = []

    def spied(parts):
        whole = side_by_side(parts)
        copied.append(whole.data_ptr() != parts[0].data_ptr())
        return whole

    monkeypatch.setattr(adapted_stack, "side_by_side", spied)
    loss_and_gradients(model)
    assert copied == [False] * 4


def test_weights_take_no_more_memory_and_keep_their_numbers():
    model = adapted(build("qwen2"))
    before, size = {name: p.clone() for name, p in model.named_parameters()}, frozen_bytes(model)
    loss_and_gradients(model)
    assert frozen_bytes(model) == size
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert len({layer.weight.untyped_storage()._cdata for layer in bases(model, *names)}) == 1
    places = [p.data_ptr() for p in model.parameters()]
    loss_and_gradients(model)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_saved_weights_are_whole(tmp_path):
    model = adapted(build("qwen2"))
    loss_and_gradients(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    save_file(state, tmp_path / "all.safetensors")
    loaded = load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in base.state_dict().items())


def test_merged_copy_is_exact():
    model = adapted(build("qwen2"))
    expected = loss_and_gradients(model)
    merged = merged_copy(model, torch.float32)
    with torch.no_grad():
        assert float(target_loss(merged, batch()).loss_sum) == pytest.approx(expected[0], rel=1e-5)
    assert_same(loss_and_gradients(model), expected)


def test_a_copy_has_weights_of_its_own():
    model = adapted(build("qwen2"))
    expected = loss_and_gradients(model)
    twin = copy.deepcopy(model)
    assert frozen_bytes(twin) == frozen_bytes(model)
    assert_same(loss_and_gradients(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(loss_and_gradients(model), expected)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_in_place_and_back(safe):
    model = adapted(build("qwen2"))
    expected = loss_and_gradients(model)
    model.merge_adapter(safe_merge=safe)  # safely: into a new tensor for each weight
    with torch.no_grad():
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(expected[0], rel=1e-5)
    model.unmerge_adapter()
    assert_same(loss_and_gradients(model), expected, tolerance=2e-5)
    assert len({layer.weight.untyped_storage()._cdata for layer in bases(model, "q_proj", "k_proj", "v_proj")}) == 1


def test_weights_that_are_moved_are_put_together_anew():
    model = adapted(build("qwen2"))
    expected = loss_and_gradients(model)
    stale = [weakref.ref(layer.weight.untyped_storage()) for layer in bases(model, "q_proj", "gate_proj")]
    model.double()
    gc.collect()
    assert [reference() for reference in stale] == [None, None]
    assert_same(loss_and_gradients(model), (expected[0], {name: g.double() for name, g in expected[1].items()}), 1e-4)
    model.float()
    assert_same(loss_and_gradients(model), expected)
    with torch.no_grad():
        (key,) = bases(model, "k_proj")
        key.weight.data = key.weight.data * 2
        expected = float(target_loss(copy.deepcopy(model).merge_and_unload(), batch()).loss_sum)
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(expected, rel=1e-5)


def test_layers_that_share_their_weights(monkeypatch):
    model = adapted(build(), layer_replication=[[0, 2], [0, 1]])
    assert len(decoder_layers(model)) == 3
    assert_same(loss_and_gradients(model), by_layers_apart(model, monkeypatch))
    assert all(stack is not None for stack in stacks(model))
    places = [p.data_ptr() for p in model.parameters()]
    loss_and_gradients(model)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_training_after_a_first_pass_in_inference_mode():
    model = adapted(build("qwen2"))
    expected = loss_and_gradients(copy.deepcopy(model))
    with torch.inference_mode():
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(expected[0], rel=1e-6)
    assert not any(p.is_inference() for p in model.parameters())
    assert_same(loss_and_gradients(model), expected)
    unwrapped(model).get_input_embeddings().weight.requires_grad_()
    for layer in decoder_layers(model):
        del layer.forward
    loss, gradients = loss_and_gradients(model)  # by layers as transformers wrote them, which keep the weights
    assert gradients.pop("base_model.model.model.embed_tokens.weight").norm() > 0
    assert_same((loss, gradients), expected)


def test_widths_that_are_not_aligned_are_left_apart(monkeypatch):
    base = build()
    layer = base.model.layers[0]
    layer.mlp.gate_proj, layer.mlp.up_proj = (torch.nn.Linear(64, 42, bias=False) for _ in range(2))
    layer.mlp.down_proj = torch.nn.Linear(42, 64, bias=False)
    model = adapted(base)
    assert_equal(model, monkeypatch)
    assert [stack is None for stack in stacks(model)] == [False, True, False, False]


def test_columns_side_by_side():
    wide = torch.arange(30.0).view(3, 10)
    parts = [wide[:, :4], wide[:, 4:5], wide[:, 5:]]
    assert side_by_side(parts).data_ptr() == wide.data_ptr()
    assert torch.equal(side_by_side(parts), wide)
    for others in (parts[::-1], parts[:2], [part.clone() for part in parts]):
        assert side_by_side(others).data_ptr() != wide.data_ptr()
        assert torch.equal(side_by_side(others), torch.cat(others, dim=1))
    heads = empty_columns([torch.empty(3, 2, 8), torch.empty(3, 1, 8)])
    assert are_columns(heads)
    assert not are_columns([head.contiguous() for head in heads])
    assert [head.shape for head in heads] == [(3, 2, 8), (3, 1, 8)]
