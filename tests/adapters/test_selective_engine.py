"""The engine runs trained copies as PyTorch does: no fused layer, graph or frozen output matrix goes past one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from micro_batches import micro_batch

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.forward import frozen_matrix, output_layer
from ludwig_peft_plugin.engine.fused.layer import FusedForward, obstacle
from ludwig_peft_plugin.engine.graphs import can_be_graphed
from ludwig_peft_plugin.engine.install import SWITCH, decoder_layers
from ludwig_peft_plugin.training.loss import target_loss

CASES: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    "all norms": ({"type": "ln_tuning"}, (False, False, False)),
    "the last norm": ({"type": "ln_tuning", "target_modules": ["model.norm"]}, (True, True, True)),
    "one norm": ({"type": "ln_tuning", "target_modules": r".*\.1\.input_layernorm"}, (True, False, True)),
    "biases": ({"type": "bitfit", "create": True}, (False, False, False)),
    "last layer": ({"type": "layers", "last": 1}, (True, True, False)),
    "first layer": ({"type": "layers", "first": 1}, (False, True, True)),
    "head": ({"type": "layers", "pattern": "lm_head.weight"}, (True, True, True)),
    "embedding": ({"type": "layers", "pattern": ".*embed_tokens.*"}, (True, True, True)),
}
"""An adapter, and which of the three layers run fused with it."""


def batch() -> MicroBatch:
    return micro_batch((7, 19, 4, 12), ids=(0, 96), seed=2)


def attached(tiny: Any, case: str, base: Any = None) -> Any:
    """Return a model whose copies have moved, in training mode."""
    options = CASES[case][0]
    model = tiny.attach(adapter_registry[options["type"]](**options), base)
    move(model)
    return model.train()


def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    result = target_loss(model, batch())
    result.loss_sum.backward()
    return float(result.loss_sum.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def plainly(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients with layers as transformers wrote them."""
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "0")
        return loss_and_gradients(model)


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=2e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert gradient.norm() > 0, name
        assert (one[1][name] - gradient).norm() / gradient.norm() < 1e-3, name


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_layers(tiny: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(tiny, case)
    plain = plainly(copy.deepcopy(model), monkeypatch)
    assert_same(loss_and_gradients(model), plain)
    base = model.get_base_model()
    layers = decoder_layers(base)
    assert all(isinstance(layer.forward, FusedForward) for layer in layers)
    assert tuple(obstacle(layer, torch.float32) is None for layer in layers) == CASES[case][1]
    assert tuple(layer.forward._parts is not None for layer in layers) == CASES[case][1]
    assert not can_be_graphed(base, base.model)  # graphs know LoRA's parameters alone
    with model.disable_adapter(), torch.no_grad():
        untrained = float(target_loss(model, batch()).loss_sum)
        assert untrained == pytest.approx(float(target_loss(tiny.base(), batch()).loss_sum), rel=2e-5)
    assert untrained != pytest.approx(plain[0], rel=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_layers_found_before_the_adapter_are_looked_at_again(
    tiny: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that was evaluated first has layers fused with the weights it had then."""
    base = tiny.base()
    with torch.no_grad():
        before = float(target_loss(base, batch()).loss_sum)
    model = attached(tiny, case, base)
    found = loss_and_gradients(model)
    assert found[0] != pytest.approx(before, rel=2e-4)
    assert_same(found, plainly(attached(tiny, case), monkeypatch))


def test_a_base_that_is_trained_later_is_looked_at_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base()
    with torch.no_grad():
        target_loss(base, batch())
    base.train()
    for chosen in ("model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"):
        base.requires_grad_(False)
        base.get_parameter(chosen).requires_grad_(True)
        other = tiny.base().train()
        other.get_parameter(chosen).requires_grad_(True)
        assert_same(loss_and_gradients(base), plainly(other, monkeypatch))


@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing_gives_the_same_gradients(tiny: Any, case: str) -> None:
    model = attached(tiny, case)
    kept = loss_and_gradients(model)
    enable_checkpointing(model)
    assert_same(loss_and_gradients(model), kept)


def test_a_trained_head_is_no_frozen_matrix(tiny: Any) -> None:
    model = attached(tiny, "head")
    assert frozen_matrix(output_layer(model)) is None
    assert frozen_matrix(output_layer(tiny.base())) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_reads_the_copies(tiny: Any, dtype: torch.dtype) -> None:
    """Through the cache, which leaves the fused layers out."""
    model = attached(tiny, "all norms", tiny.base(dtype=dtype)).eval()
    ids = tiny.ids[1:2, :8]
    answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)
