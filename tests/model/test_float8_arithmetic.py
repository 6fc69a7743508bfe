"""Rows of float8 numbers: how near they are, what the scales are, and products and gradients of such matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ludwig_peft_plugin.model.float8_arithmetic import (
    FLOAT8,
    LARGEST,
    float8_input_gradient,
    float8_matmul,
    has_float8_units,
    quantize_rows,
)
from ludwig_peft_plugin.model.row_scaled import dequantize_rows


def heavy_tailed(*size: int, seed: int = 0) -> Tensor:
    """Return numbers whose rows and columns differ in size, as those of activations do."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, generator=generator).exp() for n in size)
    return torch.randn(size, generator=generator) * rows[:, None] * columns


def error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference, relative to that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_number_is_rounded_to_three_fraction_bits(dtype: torch.dtype) -> None:
    x = heavy_tailed(64, 128).to(dtype)
    x8, scale = quantize_rows(x)
    assert (x8.dtype, x8.shape) == (FLOAT8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (64, 1))
    torch.testing.assert_close(scale[:, 0], x.float().abs().amax(1) / LARGEST)
    assert torch.equal(x8.float().abs().amax(1), torch.full((64,), LARGEST))
    # Half a step of 1/8 of the next lower power of two; below 2^-6 steps have one size.
    bound = (x.float().abs() / 16).maximum(scale * 2.0**-10)
    assert ((dequantize_rows(x8, scale) - x.float()).abs() <= bound * 1.0001).all()


def test_columns_are_scaled_before_they_are_rounded() -> None:
    x, columns = heavy_tailed(8, 32), torch.rand(32, 1) + 0.5
    for one, other in zip(quantize_rows(x, columns), quantize_rows(x * columns.T), strict=True):
        assert torch.equal(one.float(), other.float())


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite() -> None:
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e-25), torch.full((16,), 1e-38)])
    x8, scale = quantize_rows(x)
    values = dequantize_rows(x8, scale)
    assert torch.isfinite(values).all()
    assert values[0].eq(0).all()
    torch.testing.assert_close(values[1], x[1], rtol=1e-5, atol=0)
    assert (values[2] - x[2]).abs().max() <= 1e-30


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_vanish(bad: float) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = bad
    values = dequantize_rows(*quantize_rows(x))
    assert not torch.isfinite(values[0]).all()
    assert torch.equal(values[1], x[1])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_the_dequantised_matrices(out_dtype: torch.dtype) -> None:
    (x8, x_scale), (w8, w_scale) = quantize_rows(heavy_tailed(16, 64)), quantize_rows(heavy_tailed(32, 64, seed=1))
    product = float8_matmul(x8, x_scale, w8, w_scale, out_dtype)
    assert product.dtype == out_dtype
    expected = dequantize_rows(x8, x_scale) @ dequantize_rows(w8, w_scale).T
    torch.testing.assert_close(product.float(), expected, rtol=2**-7, atol=1e-4)
    ones = float8_matmul(x8, x_scale, w8, None, out_dtype)
    assert torch.equal(ones, float8_matmul(x8, x_scale, w8, torch.ones(32, 1), out_dtype))


def test_products_of_rounded_matrices_are_near() -> None:
    x, w = heavy_tailed(64, 512), torch.randn(256, 512)
    product = float8_matmul(*quantize_rows(x), *quantize_rows(w), torch.float32)
    assert 0.01 < error(product, x @ w.T) < 0.045


def test_gradient_takes_the_weight_the_forward_pass_took() -> None:
    gradient, w = heavy_tailed(64, 256) * 1e-6, heavy_tailed(256, 512, seed=1)
    w8, scale = quantize_rows(w)
    result = float8_input_gradient(gradient, w8, scale)
    exact = gradient @ dequantize_rows(w8, scale)
    rounded_anew = float8_matmul(*quantize_rows(gradient), *quantize_rows(w.T.contiguous()), torch.float32)
    assert error(result, exact) < 0.035
    assert error(result, exact) < 0.8 * error(rounded_anew, exact)
    assert torch.equal(result, float8_input_gradient(gradient, w8, scale, w8.t().contiguous()))
    assert float8_input_gradient(gradient.bfloat16(), w8, scale).dtype == torch.bfloat16


def test_gradients_are_nearer_in_e4m3_than_in_e5m2() -> None:
    gradient = heavy_tailed(64, 512)
    largest = gradient.abs().amax(1, keepdim=True)
    e5m2 = (gradient * (57344 / largest)).to(torch.float8_e5m2).float() * (largest / 57344)
    assert error(dequantize_rows(*quantize_rows(gradient)), gradient) < 0.6 * error(e5m2, gradient)


def test_cpus_have_no_float8_units() -> None:
    assert not has_float8_units(torch.device("cpu"))
