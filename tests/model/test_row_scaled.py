"""Layers with weights in 8-bit rows: they are linear layers, with the right gradients, in every way they are moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ludwig_peft_plugin.model.dequantize import dequantizer_of, plain_parameters, weight_only_forward
from ludwig_peft_plugin.model.float8 import Float8Linear, keep_transposed_copies
from ludwig_peft_plugin.model.row_scaled import Int8Linear, RowScaledLinear

KINDS: tuple[type[RowScaledLinear], ...] = (Float8Linear, Int8Linear)
STORED = {Float8Linear: torch.float8_e4m3fn, Int8Linear: torch.int8}
ERROR = {Float8Linear: 0.03, Int8Linear: 0.01}


def linear(inputs: int = 64, outputs: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def simulated(layer: Float8Linear) -> Float8Linear:
    """Have a layer round activations and gradients as on a GPU with float8 units; the products are PyTorch's."""
    layer.multiplies_in_float8 = True
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradient_are_those_of_the_dequantised_weight(
    kind: type[RowScaledLinear], bias: bool, dtype: torch.dtype
) -> None:
    original = linear(bias=bias, dtype=dtype)
    layer = kind.from_linear(original)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == STORED[kind]
    weight = layer.weight.float() * layer.scale
    assert (weight - original.weight.float()).norm() < ERROR[kind] * original.weight.float().norm()
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, weight.to(dtype), original.bias)
    # The bias is added to the product after it was rounded to the dtype.
    torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    (reference,) = torch.autograd.grad(expected, x, seed)
    torch.testing.assert_close(gradient, reference)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_trained_and_the_weight_is_not(kind: type[RowScaledLinear]) -> None:
    layer = kind.from_linear(linear())
    layer.bias.requires_grad_(True)
    layer(torch.randn(4, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 4.0))
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_dequantised_weight(kind: type[RowScaledLinear]) -> None:
    layer = kind.from_linear(linear())
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(4, 64, requires_grad=True))
    assert {tensor.dtype for tensor in saved if tensor.shape == (48, 64)} == {STORED[kind]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")]
)
def test_a_change_of_dtype_leaves_the_numbers_alone(kind: type[RowScaledLinear], move: Any) -> None:
    layer = kind.from_linear(linear())
    before = layer.dequantize()
    move(layer)
    assert layer.weight.dtype == STORED[kind]
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.dequantize(), before)
    assert not layer.weight.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_moves_and_copies(kind: type[RowScaledLinear]) -> None:
    layer = kind.from_linear(linear())
    elsewhere = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in (elsewhere.weight, elsewhere.scale, elsewhere.bias)} == {"meta"}
    back = elsewhere.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(back(x), layer(x))
    assert layer.state_dict().keys() == {"weight", "scale", "bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_is_read_as_a_plain_layer(kind: type[RowScaledLinear]) -> None:
    original = linear()
    layer = kind.from_linear(original)
    parameters = plain_parameters(layer)
    assert parameters.keys() == {"weight", "bias"}
    assert parameters["weight"].dtype == torch.float32
    x = torch.randn(4, 64)
    with weight_only_forward(layer):
        y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, parameters["weight"], original.bias))
    assert dequantizer_of(original) is None


def test_float8_rounds_activations_and_gradients_where_units_are() -> None:
    layer = Float8Linear.from_linear(linear())
    x = torch.randn(2, 7, 64, requires_grad=True)
    exact = layer(x)
    seed = torch.randn_like(exact)
    (exact_gradient,) = torch.autograd.grad(exact, x, seed)
    simulated(layer)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, seed)
    for value, reference in ((y, exact), (gradient, exact_gradient)):
        assert value.shape == reference.shape
        assert 0.005 < (value - reference).norm() / reference.norm() < 0.045
    with weight_only_forward(layer):
        torch.testing.assert_close(layer(x), exact)


def test_a_transposed_copy_changes_no_gradient() -> None:
    layer = simulated(Float8Linear.from_linear(linear()))
    x = torch.randn(9, 64, requires_grad=True)
    (without,) = torch.autograd.grad(layer(x).square().sum(), x)
    keep_transposed_copies(nn.Sequential(layer))
    assert layer.weight_t is not None
    assert layer.weight_t.is_contiguous()
    assert torch.equal(layer.weight_t.float(), layer.weight.float().T)
    (kept,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(kept, without)
    assert "weight_t" not in layer.state_dict()
    keep_transposed_copies(layer, keep=False)
    assert layer.weight_t is None


def test_no_copy_where_it_is_of_no_use() -> None:
    layer = Float8Linear.from_linear(linear())
    keep_transposed_copies(layer)
    assert layer.weight_t is None


# torch's compiler makes an instance of the class, which torch's autograd warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("float8", [False, True])
def test_compiles_into_one_graph(float8: bool) -> None:
    layer = Float8Linear.from_linear(linear())
    layer.multiplies_in_float8 = float8
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, requires_grad=True)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, reference)
