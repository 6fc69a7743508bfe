"""Checkpoints of layers of any shape, and of models whose own code calls them."""

from functools import partial

import pytest
import torch
from torch import nn

from ludwig_peft_plugin.engine.checkpoint import LayerCheckpoint, enable_checkpointing
from ludwig_peft_plugin.errors import ModelError


def is_own_checkpoint(outputs: torch.Tensor) -> bool:
    return "_Checkpointed" in outputs.grad_fn.name()


class Block(nn.Module):
    """A layer that also returns a number, and changes its input in place if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor, *, scale: torch.Tensor, in_place: bool = False) -> tuple:
        if in_place:
            hidden.mul_(2)
        return self.linear(hidden) * scale, None, self.linear(hidden).relu()


def test_several_outputs():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 3, requires_grad=True)
    gradients = []
    for call in (block, partial(LayerCheckpoint(None), partial(block, scale=torch.tensor(2.0)))):
        block.zero_grad()
        x.grad = None
        first, nothing, second = call(x, scale=torch.tensor(2.0)) if call is block else call(x)
        assert nothing is None
        (first.sum() + second.square().sum()).backward()
        gradients.append((block.linear.weight.grad.clone(), x.grad.clone()))
    assert all(map(torch.equal, *gradients))


def test_autograd_grad_is_refused():
    """It would leave out the parameters' gradients without a word, or add them to `grad`."""
    block, x = Block(), torch.randn(4, 3, requires_grad=True)
    outputs = LayerCheckpoint(None)(partial(block.__call__, scale=torch.tensor(1.0)), x)
    with pytest.raises(RuntimeError, match=r"not from autograd\.grad"):
        torch.autograd.grad(outputs[0].sum(), x)


def test_gradients_of_other_arguments_are_kept():
    """Where gradients flow through more than the first argument, PyTorch's checkpoint takes over."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 3, requires_grad=True)
    for scale in (torch.tensor(2.0, requires_grad=True), torch.tensor([2.0]).requires_grad_()):
        first, _, _ = LayerCheckpoint(None)(partial(block, scale=scale), x)
        first.sum().backward()
        assert scale.grad.item() == pytest.approx(float(block.linear(x).sum().detach()), rel=1e-5)
    state: dict[int, torch.Tensor] = {}

    def layer(hidden: torch.Tensor, shared: dict[int, torch.Tensor]) -> torch.Tensor:
        shared[0] = block.linear(hidden)
        return hidden * 2

    outputs = LayerCheckpoint(None)(layer, x, state)
    assert state[0].requires_grad
    assert not is_own_checkpoint(outputs)


def test_a_layer_that_changes_its_input_is_refused():
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="in place"):
        LayerCheckpoint(None)(partial(Block().__call__, scale=torch.tensor(1.0), in_place=True), x)


class OtherCode(nn.Module):
    """A model whose own code calls the checkpoint from its loop over layers."""

    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.checkpoint = None

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: object = None) -> None:
        self.checkpoint = gradient_checkpointing_func if enable else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.checkpoint(layer.__call__, x) if self.checkpoint else layer(x)
        return x


def test_models_of_other_code():
    model, x = OtherCode(), torch.randn(2, 3)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    enable_checkpointing(model)
    outputs = model(x)
    assert is_own_checkpoint(outputs)
    outputs.sum().backward()
    assert all(map(torch.equal, (p.grad for p in model.parameters()), expected))
    with pytest.raises(ModelError, match=r"checkpoint_layers.*OtherCode"):
        enable_checkpointing(model, layers=0.5)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="enable_gradient_checkpointing"):
        enable_checkpointing(model)
