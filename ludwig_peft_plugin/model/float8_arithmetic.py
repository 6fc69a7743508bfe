r"""Rows of float8 numbers with a scale each, and products of such matrices.

    scale_i = \max_j |x_{ij}| / 448,    x8_{ij} = round(x_{ij} / scale_i),    x \approx scale \odot x8

e4m3 (4 exponent and 3 fraction bits, Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433) is used for weights,
activations and gradients alike. Its largest number is 448; with a scale a row, 2^15 of range keeps all its bits. For
gradients the paper's e5m2 has more range and one bit less; with a scale a row the range is not needed, and the error of
a product of two such matrices is 3.8% with e4m3 and 5.9% with e5m2 (of its norm, for Gaussian and for heavier tails).

GPUs from Ada and Hopper on (compute capability 8.9) multiply float8 at twice the rate of bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ludwig_peft_plugin.model.row_scaled import dequantize_rows

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST_MAXIMUM = 2.0**-100
"""Rows whose largest number is smaller are scaled as if it were this; float32 holds its inverse times 448."""


def has_float8_units(device: torch.device) -> bool:
    """Return whether a device multiplies float8 numbers itself."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `x` as float8 rows, shape (M, K), and their scales, float32, shape (M, 1).

    On GPUs with float8 units this is one Triton kernel, inside a compiled function whatever the compiler fuses it
    with, elsewhere PyTorch's own operations; all round alike.

    Args:
        x: float32, bfloat16 or float16, shape (M, K), with the numbers of a row next to each other.
        column_scale: float32, K numbers, which the columns are multiplied by before they are rounded.
    """
    if x.is_cuda and not torch.compiler.is_compiling() and has_float8_units(x.device):
        from ludwig_peft_plugin.model.float8_kernel import quantize_rows as kernel

        return kernel(x, column_scale)
    return reference_quantize_rows(x, column_scale)


def reference_quantize_rows(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Do what `quantize_rows` does, in PyTorch's operations."""
    values = x.float()
    if column_scale is not None:
        values = values * column_scale.view(1, -1)
    largest = values.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_MAXIMUM)
    return (values * (LARGEST / largest)).to(FLOAT8), largest * (1.0 / LARGEST)


def float8_matmul(
    x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return (x_scale * x8) (w_scale * w8)^T, shape (M, N).

    Args:
        x8: shape (M, K), float8, contiguous.
        x_scale: shape (M, 1), float32.
        w8: shape (N, K), float8, contiguous. N and K are multiples of 16.
        w_scale: shape (N, 1), float32; None for ones.
        out_dtype: of the result. GPUs round to bfloat16 first.
    """
    if w_scale is None:
        w_scale = x_scale.new_ones(w8.shape[0], 1)
    if x8.is_cuda:
        # Sums stay in the tensor cores ("fast accumulation"): their error is small beside that of 3 fraction bits.
        product = torch._scaled_mm(
            x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        product = dequantize_rows(x8, x_scale) @ dequantize_rows(w8, w_scale).T
    # Not always `.to`: of an autograd function whose result is also the result of another of its operations, torch's
    # compiler sends the gradient to the wrong one of the two, where it is lost.
    return product if product.dtype == out_dtype else product.to(out_dtype)


def float8_input_gradient(gradient: Tensor, weight: Tensor, scale: Tensor, weight_t: Tensor | None = None) -> Tensor:
    """Return the gradient of x in y = x (scale * weight)^T, shape (M, in), in the dtype of `gradient`.

    The weight's scales go into the gradient before its rows are rounded, so the product takes the weight's own float8
    numbers, which the forward pass multiplies with too. Rounding the transposed weight anew would add an error.

    Args:
        gradient: of y, shape (M, out).
        weight: shape (out, in), float8.
        scale: shape (out, 1), float32.
        weight_t: the same weight transposed, shape (in, out), contiguous; None makes it for the occasion. Float8
            units only multiply along rows that are contiguous.
    """
    gradient8, gradient_scale = quantize_rows(gradient, scale)
    weight_t = weight.t().contiguous() if weight_t is None else weight_t
    return float8_matmul(gradient8, gradient_scale, weight_t, None, gradient.dtype)
