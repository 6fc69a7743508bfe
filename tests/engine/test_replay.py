"""A checkpointed layer finds the random numbers and the precision of its first pass again."""

import pytest
import torch
from torch import nn

from ludwig_peft_plugin.engine.checkpoint import LayerCheckpoint
from ludwig_peft_plugin.engine.replay import recomputed_layer


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def gradients(layer: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in layer.parameters()]


def test_dropout_is_the_same_and_the_generators_stay_where_they_are(layer, x):
    results = []
    for checkpointed in (False, True):
        layer.zero_grad()
        torch.manual_seed(3)
        outputs = LayerCheckpoint(None)(layer.__call__, x) if checkpointed else layer(x)
        after_forward = torch.get_rng_state()
        torch.rand(7)  # what other layers draw
        before = torch.get_rng_state()
        outputs.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        results.append((outputs, after_forward, *gradients(layer)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("inside", [True, False])
def test_mixed_precision_is_the_same(layer, x, inside):
    """The backward pass may run within the region of mixed precision or, as it should, outside."""
    layer.eval()
    results = []
    for checkpointed in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = LayerCheckpoint(None)(layer.__call__, x) if checkpointed else layer(x)
            loss = outputs.float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append((outputs, *gradients(layer)))
    assert all(map(torch.equal, *results))
    assert results[0][0].dtype == torch.bfloat16
    assert not torch.equal(results[0][0].float(), layer(x))


def test_full_precision_stays_full_in_a_backward_pass_within_mixed_precision(layer, x):
    seen: list[torch.dtype] = []
    layer[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    outputs = LayerCheckpoint(None)(layer.__call__, x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs.sum().backward()
    assert seen == [torch.float32] * 2


def test_a_layer_knows_that_its_output_is_not_read(layer, x):
    other = nn.Linear(6, 6)
    seen: list[tuple[nn.Module, bool]] = []
    for each in (layer, other):
        each.register_forward_hook(lambda module, *_: seen.append((module, recomputed_layer() is module)))
    checkpoint = LayerCheckpoint(None)
    checkpoint(other.__call__, checkpoint(layer.__call__, x)).sum().backward()
    assert seen == [(layer, False), (other, False), (other, True), (layer, True)]
    assert recomputed_layer() is None


def test_it_is_forgotten_when_a_recomputed_layer_fails(layer, x):
    outputs = LayerCheckpoint(None)(layer.__call__, x)
    layer.register_forward_pre_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(MemoryError):
        outputs.sum().backward()
    assert recomputed_layer() is None
    assert torch.equal(torch.get_rng_state(), state)


def fail(*_: object) -> None:
    raise MemoryError
