"""The bottleneck tuner: starts as the base, trains only its own weights on any base, and PEFT's calls work with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disturbed import disturbed
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN

from ludwig_peft_plugin.adapters.bottleneck import BottleneckLayer
from ludwig_peft_plugin.adapters.bottleneck.config import ARCHITECTURES, NON_LINEARITIES
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.methods.bottleneck import BottleneckAdapterConfig
from ludwig_peft_plugin.config.adapter_types import adapter_class
from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.forward import target_states
from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig


def layers(model: Any) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def new(tiny: Any, base: Any = None, **options: Any) -> Any:
    return tiny.attach(BottleneckAdapterConfig(**{"reduction_factor": 8, **options}), base)


def quantized(tiny: Any, kind: str) -> Any:
    if kind in ("4", "8"):
        return tiny.base(bits=int(kind))
    settings = RowScaledConfig("int8_weight_only")
    model = LlamaForCausalLM.from_pretrained(tiny.folder(), dtype=torch.float32, quantization_config=settings)
    return model.requires_grad_(False).eval()


def test_the_alias() -> None:
    assert adapter_class("adapter") is BottleneckAdapterConfig


def test_every_activation_of_transformers_that_has_no_parameters() -> None:
    with_parameters = {"prelu", "xielu"}
    assert set(NON_LINEARITIES) == {*ACT2FN} - with_parameters | {"leakyrelu"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_starts_as_the_base_and_learns(tiny: Any, architecture: str) -> None:
    base = tiny.logits(tiny.base())
    model = new(tiny, architecture=architecture)
    assert torch.equal(tiny.logits(model), base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("bottleneck_" in name for name in trained)
    assert len(layers(model)) == (2 if architecture == "houlsby" else 1) * tiny.layers
    frozen = tiny.weights(model)
    batch = next(tiny.batches())
    before = float(model(**batch).loss.detach())
    tiny.train(model, steps=8)
    model.eval()
    assert float(model(**batch).loss.detach()) < before - 0.1
    assert all(gradient.norm() > 0 for gradient in tiny.gradients(model).values())
    assert tiny.gradients(model).keys() == trained
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny.weights(model).items())
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)


def test_one_layer_computes_the_equation(tiny: Any) -> None:
    """Pfeiffer in layer 0 alone: the layer's output y becomes y + U relu(D y + d) + u."""
    seen: dict[str, Tensor] = {}
    base = tiny.base()
    handle = base.model.layers[0].register_forward_hook(lambda layer, args, output: seen.update(base=output))
    tiny.logits(base)
    handle.remove()
    model = disturbed(new(tiny, base, leave_out=[1, 2]), 0.1)
    base.model.layers[0].register_forward_hook(lambda layer, args, output: seen.update(adapted=output))
    tiny.logits(model)
    (layer,) = layers(model)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    y = seen["base"]
    assert torch.allclose(seen["adapted"], y + up(torch.relu(down(y))), atol=1e-5)


@pytest.mark.parametrize("kind", ["4", "8", "torchao"])
def test_a_quantised_base_trains_and_only_the_adapter_is_saved(tiny: Any, kind: str, tmp_path: Path) -> None:
    base = quantized(tiny, kind)
    expected = tiny.logits(base)
    model = new(tiny, base, architecture="houlsby")
    assert torch.equal(tiny.logits(model), expected)
    frozen = tiny.weights(model)
    batch = next(tiny.batches())
    before = float(model(**batch).loss.detach())
    tiny.train(model, steps=6)
    model.eval()
    assert float(model(**batch).loss.detach()) < before - 0.05
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny.weights(model).items())
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    save_adapter(model, str(tmp_path / "own"))
    for folder in ("peft", "own"):
        state = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert len(state) == 2 * tiny.layers * 4
        assert all(".bottleneck_" in name for name in state)
    trained = tiny.logits(model)
    plain = PeftModel.from_pretrained(quantized(tiny, kind), str(tmp_path / "peft"))
    assert torch.equal(tiny.logits(plain), trained)
    assert torch.equal(
        tiny.logits(load_adapter(quantized(tiny, kind), str(tmp_path / "own"), trainable=False)), trained
    )


@pytest.mark.parametrize("sparing", [False, True])
def test_saved_options_rebuild_the_adapter(tiny: Any, sparing: bool, tmp_path: Path) -> None:
    options = {"ln_before": True, "ln_after": True, "scaling": "channel", "reduction_factor": {0: 4, "default": 16}}
    model = disturbed(new(tiny, **options), 0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny.base(), str(tmp_path), low_cpu_mem_usage=sparing)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_several_adapters(tiny: Any, tmp_path: Path) -> None:
    base = tiny.logits(tiny.base())
    model = disturbed(new(tiny), 0.1)
    first = tiny.logits(model)
    other = disturbed(new(tiny, architecture="houlsby"), 0.1, seed=6)
    second = tiny.logits(other)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    model.load_adapter(str(tmp_path), "other")
    assert torch.equal(tiny.logits(model), first)
    model.set_adapter("other")
    assert torch.equal(tiny.logits(model), second)
    model.base_model.set_adapter(["default", "other"])
    both = tiny.logits(model)
    assert min((both - single).abs().max() for single in (first, second, base)) > 1e-3
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(tiny.logits(model), first)
    assert not any("other" in name for name, _ in model.named_parameters())
    assert torch.equal(tiny.logits(copy.deepcopy(model)), first)


def test_unloading_leaves_the_base_as_it_was(tiny: Any) -> None:
    base = tiny.base()
    names, expected = [name for name, _ in base.named_modules()], tiny.logits(base)
    model = disturbed(new(tiny, base, architecture="houlsby"), 0.1)
    plain = model.unload()
    assert [name for name, _ in plain.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(tiny.logits(plain), expected)


def test_merging_is_refused_with_the_reason(tiny: Any) -> None:
    model = new(tiny)
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="non-linear"):
            call()
    assert "non-linear" in str(BottleneckAdapterConfig().merge_obstacle(tiny.base()))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_gives_the_same_gradients(tiny: Any, architecture: str, own: bool) -> None:
    model = disturbed(new(tiny, architecture=architecture), 0.1).train()
    other = copy.deepcopy(model)
    if own:
        enable_checkpointing(other)
    else:
        other.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients = []
    for one in (model, other):
        one(**next(tiny.batches())).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(layer.tap.take() is None for layer in layers(other))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_generation_is_one_by_one(tiny: Any, architecture: str) -> None:
    model = disturbed(new(tiny, architecture=architecture), 0.1).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = [tiny.ids[0, :5], tiny.ids[1, :9]]
    ids = torch.stack([torch.cat([row.new_zeros(9 - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows]).long()
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, 9:]
    for row, generated in zip(rows, together, strict=True):
        for cached in (True, False):
            alone = model.generate(
                input_ids=row[None], attention_mask=torch.ones_like(row[None]), use_cache=cached, **settings
            )
            assert torch.equal(alone[0, len(row) :], generated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_without_padding_give_the_padded_states(tiny: Any, architecture: str) -> None:
    model = disturbed(new(tiny, architecture=architecture), 0.1).eval()
    lengths = (7, 12, 4)
    rows = [tiny.ids[number, :length] for number, length in enumerate(lengths)]
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = MicroBatch(
        rows=np.arange(3),
        input_ids=torch.cat(rows),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, 7, 19, 23], dtype=torch.int32),
        max_length=12,
        targets=nothing,
        target_positions=torch.arange(23),
        target_rows=nothing,
        tokens=23,
    )
    apart = torch.cat([model.base_model.model.model(input_ids=row[None]).last_hidden_state[0] for row in rows])
    assert torch.allclose(target_states(model, batch), apart, atol=1e-4)


def test_a_half_precision_base(tiny: Any) -> None:
    model = disturbed(new(tiny, tiny.base(dtype=torch.bfloat16)), 0.1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert tiny.logits(model).dtype == torch.bfloat16
    assert (tiny.logits(model).float() - tiny.logits(disturbed(new(tiny), 0.1))).abs().max() < 0.2


def test_dropout_acts_in_training_only(tiny: Any) -> None:
    model, plain = disturbed(new(tiny, dropout=0.5), 0.1), disturbed(new(tiny), 0.1)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    model.train()
    one, other = (model(input_ids=tiny.ids).logits for _ in range(2))
    assert not torch.equal(one, other)
