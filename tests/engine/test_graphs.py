"""CUDA graphs: sizes large enough for their batches and never taken for equally long ones, and how long they last."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.adapters.several.active import set_adapter, use_adapter
from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.forward import target_logits
from ludwig_peft_plugin.engine.fused.rows import filled_up
from ludwig_peft_plugin.engine.graph_size import Size
from ludwig_peft_plugin.engine.graphs import GraphedBackbone


def batch(lengths: list[int], targets: int = 0) -> MicroBatch:
    empty = torch.zeros(targets, dtype=torch.int64)
    flat = torch.zeros(sum(lengths), dtype=torch.int64)
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return MicroBatch(np.arange(len(lengths)), flat, flat, boundaries, max(lengths), empty, empty, empty, sum(lengths))


@pytest.mark.parametrize("seed", range(5))
def test_sizes(seed):
    generator = np.random.default_rng(seed)
    for _ in range(300):
        count = int(generator.integers(1, 20))
        even = generator.random() < 0.3
        lengths = [int(generator.integers(1, 300))] * count if even else generator.integers(1, 300, count).tolist()
        tokens = sum(lengths)
        targets = int(generator.integers(1, tokens + 1))
        size = Size.of(batch(lengths, targets))
        assert size.is_even == (len(set(lengths)) == 1)
        assert size.holds(size)
        assert size.tokens >= tokens
        assert size.max_length >= max(lengths)
        assert targets <= size.targets <= min(size.tokens, targets + size.tokens // 4)
        if not size.is_even:
            assert size.sequences > count  # room for the filler
            assert size.max_length >= size.tokens - tokens
            assert size.tokens <= max(tokens * 1.07, tokens + 64)


def test_a_size_that_would_look_even_is_made_larger():
    uneven = Size(1024, 8, 127, 9).joined(Size(1024, 7, 128, 9))
    assert not uneven.is_even
    assert uneven.sequences >= 8


def test_joined_sizes_hold_both():
    one, other = Size(512, 8, 256, 300), Size(512, 16, 128, 200)
    joined = one.joined(other)
    assert joined.holds(one)
    assert joined.holds(other)
    assert not one.holds(other)
    assert not Size(512, 4, 128, 512).holds(one)  # four sequences of 128: equally long ones only


def test_equally_long_sequences_share_a_graph_with_room_for_all_their_targets():
    few, many = Size(512, 4, 128, 128), Size(512, 4, 128, 384)
    assert not few.holds(many)
    assert few.joined(many) == many
    assert not few.resembles(Size(512, 2, 256, 128))


def test_what_is_left_over_of_a_graph_is_filled_with_places_that_occur_once():
    wanted = torch.tensor([2, 3, 7])
    assert filled_up(wanted, 6, 9).tolist() == [2, 3, 7, 0, 1, 4]
    assert filled_up(wanted, 3, 9).tolist() == [2, 3, 7]
    assert sorted(filled_up(wanted, 9, 9).tolist()) == list(range(9))


def test_graphs_end_with_the_adapter_they_were_made_for(monkeypatch):
    """The first layer has no adapter, so nothing in it tells one from the other."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape)).requires_grad_(False)
    settings = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    model = get_peft_model(base, LoraConfig(r=2, **settings), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, **settings))
    part = batch([5, 9])

    def runs() -> None:
        target_logits(model, replace(part, target_positions=torch.tensor([3])))

    runs()
    graphs = GraphedBackbone(base, base.model)
    runs()
    assert graphs.is_valid
    with use_adapter(model, "two"):
        assert not graphs.is_valid
    assert graphs.is_valid, "nothing ran in between"
    set_adapter(model, "two", trained=["two"])
    assert not graphs.is_valid
    set_adapter(model, "one", trained=["one"])
    assert graphs.is_valid
    with torch.no_grad(), use_adapter(model, None):
        runs()
    assert not graphs.is_valid, "the layers have found their memory anew"
    assert GraphedBackbone(base, base.model).is_valid


def test_graphs_end_with_the_weights_they_read(monkeypatch):
    """PEFT's careful merge puts new weights in the place of those that the graphs read."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape)).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    part = replace(batch([5, 9]), target_positions=torch.tensor([3]))
    target_logits(model, part)
    graphs = GraphedBackbone(base, base.model)
    assert graphs.is_valid
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert not graphs.is_valid
