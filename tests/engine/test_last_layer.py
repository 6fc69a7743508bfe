"""The last decoder layer goes on with the rows that predict targets alone: same loss, same gradients, less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_models import ADAPTERS, SHAPE, adapted, assert_equal, batch, build, loss_and_gradients

from ludwig_peft_plugin.engine.forward import target_states, unwrapped
from ludwig_peft_plugin.engine.fused import blocks
from ludwig_peft_plugin.engine.fused.rows import select_rows
from ludwig_peft_plugin.engine.install import decoder_layers, prepare


@pytest.fixture
def rows_of_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows go through each feed-forward block, in the order of the layers."""
    found: list[int] = []
    plain = blocks.swiglu

    def counted(gate: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(len(gate))
        return plain(gate, *rest)

    monkeypatch.setattr(blocks, "swiglu", counted)
    return found


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_only_rows_with_a_target_are_computed(
    adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rows_of_blocks: list[int]
) -> None:
    model = adapted(build("llama with biases"), **adapter)
    assert_equal(model, monkeypatch)
    rows_of_blocks.clear()
    loss_and_gradients(model)
    part = batch()
    assert 0 < part.target_tokens < len(part.input_ids)
    assert rows_of_blocks == [len(part.input_ids)] * (SHAPE["num_hidden_layers"] - 1) + [part.target_tokens]


def test_under_gradient_checkpointing(rows_of_blocks: list[int]) -> None:
    model = adapted(build()).train()
    expected = loss_and_gradients(model)
    rows_of_blocks.clear()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, gradients = loss_and_gradients(model)
    part = batch()
    every, wanted = len(part.input_ids), part.target_tokens
    assert rows_of_blocks == [every, wanted, wanted, every]  # forward, and again from the last layer to the first
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient)


def test_a_last_layer_that_is_not_fused_returns_the_same_rows() -> None:
    model = adapted(build(), bias="all").eval()  # biases that are trained are not fused
    part = batch()
    with torch.no_grad():
        states = target_states(model, part)
        base = unwrapped(model)
        prepare(base)
        every = base.model(
            input_ids=part.input_ids[None],
            position_ids=part.position_ids[None],
            cu_seq_lens_q=part.cu_seqlens,
            cu_seq_lens_k=part.cu_seqlens,
            max_length_q=part.max_length,
            max_length_k=part.max_length,
            use_cache=False,
        ).last_hidden_state[0]
    assert [layer.forward.last for layer in decoder_layers(model)] == [False, True]
    torch.testing.assert_close(states, every[part.target_positions])


def test_gradients_of_selected_rows() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 3])
    assert torch.equal(select_rows(x, indices), x[indices])
    assert torch.autograd.gradcheck(lambda rows: select_rows(rows, indices), (x,))
