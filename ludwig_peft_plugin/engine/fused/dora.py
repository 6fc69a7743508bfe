r"""DoRA's column scales, without a matrix of the size of W (Liu et al. 2024, arXiv:2402.09353).

c = m / ||W + s B A||_row
||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i^T
"""

from __future__ import annotations

from torch import Tensor

from ludwig_peft_plugin.engine.fused.products import product_fp32


def dora_scale(weight: Tensor, squared_norms: Tensor, a: Tensor, b: Tensor, scaling: float, m: Tensor) -> Tensor:
    """Return c, shape (out,), float32.

    The norm is rounded to the base's dtype, as PEFT does, so that c starts at exactly 1.

    Args:
        weight: W (out, in), in the dtype of the computation.
        squared_norms: those of its rows, shape (out,), float32.
        a: A (r, in).
        b: B (out, r).
        scaling: s.
        m: the magnitude, shape (out,).
    """
    a, b = a.float(), b.float()
    crossed = product_fp32(weight, a.to(weight.dtype).T)
    squares = squared_norms + 2 * scaling * (crossed * b).sum(1) + scaling * scaling * ((b @ (a @ a.T)) * b).sum(1)
    norms = squares.clamp_min(0).sqrt().to(weight.dtype)
    return m.float() / norms.float()
