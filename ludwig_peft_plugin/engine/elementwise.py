r"""What happens between the matrix products of a Llama-like layer: on a GPU one Triton kernel each, else PyTorch's own.

    rms_norm(x)   = w \odot x / \sqrt{mean(x^2) + \epsilon}           Zhang & Sennrich 2019, arXiv:1910.07467
    rotate(x)     = (x_1 c - x_2 s, x_2 c + x_1 s), halves x_1, x_2   RoPE: Su et al. 2021, arXiv:2104.09864
    swiglu(g, u)  = g \sigma(g) \odot u                               Shazeer 2020, arXiv:2002.05202
    loss(z, y)    = log \sum_v exp(z_v) - z_y

All compute in float32 and round once. The kernels' counterparts in `reference_*` are what the tests compare them with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]
LowRank = Pair | None
"""left (T, r) and right (N, r) of a product left right^T that is added to a (T, N) tensor on the way."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r"""Return the normalised rows of x, shape (T, H), and \(1 / \sqrt{mean(x^2) + \epsilon}\), shape (T,), float32."""
    if x.is_cuda:
        from ludwig_peft_plugin.engine.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    return reference_rms_norm(x, weight, eps)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grads: list[Tensor], residual: Tensor) -> Tensor:
    """Return the gradient of x plus `residual`, all (T, H).

    Args:
        x: the rows that were normalised.
        weight: shape (H,).
        eps: as in the forward pass.
        grads: one to three tensors whose sum is the gradient of the normalised rows.
        residual: the gradient that reaches x past the norm.
    """
    if x.is_cuda:
        from ludwig_peft_plugin.engine.kernels.rms_norm import rms_norm_backward as kernel

        return kernel(x, weight, eps, [grad.contiguous() for grad in grads], residual.contiguous())
    return reference_rms_norm_backward(x, weight, eps, grads, residual)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Return x, shape (T, heads, d), rotated by the angles of `cos` and `sin`, shape (T, d), or back by them."""
    if x.is_cuda:
        from ludwig_peft_plugin.engine.kernels.rope import rotate as kernel

        return kernel(x, cos, sin, inverse)
    return reference_rotate(x, cos, sin, inverse)


def swiglu(gate: Tensor, up: Tensor, gate_plus: LowRank = None, up_plus: LowRank = None) -> Tensor:
    """Return silu(gate) * up, shape (T, F), each with a low-rank product added first where one is given."""
    if gate.is_cuda:
        from ludwig_peft_plugin.engine.kernels.swiglu import swiglu as kernel

        return kernel(gate, up, gate_plus, up_plus)
    return reference_swiglu(gate, up, gate_plus, up_plus)


def swiglu_backward_(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    gate_plus: LowRank = None,
    up_plus: LowRank = None,
    grad_plus: LowRank = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up and the activation itself; the first three inputs are overwritten."""
    if gate.is_cuda:
        from ludwig_peft_plugin.engine.kernels.swiglu import swiglu_backward_ as kernel

        return kernel(gate, up, grad, gate_plus, up_plus, grad_plus)
    return reference_swiglu_backward_(gate, up, grad, gate_plus, up_plus, grad_plus)


def swiglu_adapters_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, gate_plus: Pair, up_plus: Pair, grad_plus: Pair
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up (T, F), which are overwritten, and those of the adapter weights around them.

    The latter, in float32: of_gate^T h_gate and of_up^T h_up (F, r), and g_down^T activation (r, F), where h_gate, h_up
    and g_down are the left factors (T, r) of the three low-rank products.
    """
    if gate.is_cuda:
        from ludwig_peft_plugin.engine.kernels.swiglu_adapters import swiglu_adapters_backward_ as kernel

        return kernel(gate, up, grad, gate_plus, up_plus, grad_plus)
    return reference_swiglu_adapters_backward_(gate, up, grad, gate_plus, up_plus, grad_plus)


def add_(y: Tensor, plus: LowRank, residual: Tensor) -> Tensor:
    """Return y + left right^T + residual in the memory of y, shape (T, N)."""
    if y.is_cuda:
        from ludwig_peft_plugin.engine.kernels.low_rank import add_ as kernel

        return kernel(y, plus, residual.contiguous())
    return reference_add_(y, plus, residual)


def scale_columns_(y: Tensor, plus: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return scale * (y + left right^T) + bias in the memory of y (T, N); scale (N,) is float32."""
    if y.is_cuda:
        from ludwig_peft_plugin.engine.kernels.dora import scale_columns_ as kernel

        return kernel(y, plus, scale, bias)
    return reference_scale_columns_(y, plus, scale, bias)


def scaled_gradient(grad: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return grad * scale, shape (T, N), and sum_t grad_t * (y_t - bias), shape (N,), float32."""
    if y.is_cuda:
        from ludwig_peft_plugin.engine.kernels.dora import scaled_gradient as kernel

        return kernel(grad.contiguous(), y.contiguous(), scale, bias)
    return reference_scaled_gradient(grad, y, scale, bias)


def cross_entropy_(
    logits: Tensor, targets: Tensor, *, with_gradient: bool, gradient_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return each row's loss (float32) and whether its target was the most likely token (bool), both (M,).

    Args:
        logits: shape (M, V), contiguous rows; overwritten by `gradient_scale` times their gradient when
            `with_gradient`.
        targets: shape (M,), int64.
        with_gradient: whether the gradient is wanted.
        gradient_scale: keeps small float16 gradients from vanishing.
    """
    if logits.is_cuda:
        from ludwig_peft_plugin.engine.kernels.cross_entropy import cross_entropy_ as kernel

        return kernel(logits, targets, with_gradient, gradient_scale)
    return reference_cross_entropy_(logits, targets, with_gradient, gradient_scale)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Do what `rms_norm` says with PyTorch's operations."""
    values = x.float()
    scales = torch.rsqrt(values.square().mean(dim=1) + eps)
    return (values * scales[:, None]).to(x.dtype) * weight, scales


def reference_rms_norm_backward(x: Tensor, weight: Tensor, eps: float, grads: list[Tensor], residual: Tensor) -> Tensor:
    """Do what `rms_norm_backward` says with PyTorch's operations."""
    values = x.float()
    scale = torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
    total = torch.stack([grad.float() for grad in grads]).sum(dim=0)
    normed, scaled = values * scale, total * weight.float()
    gradient = scale * (scaled - normed * (scaled * normed).mean(dim=1, keepdim=True))
    return (gradient + residual.float()).to(x.dtype)


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Do what `rotate` says with PyTorch's operations."""
    first, second = x.float().chunk(2, dim=-1)
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float() * (-1.0 if inverse else 1.0)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


def reference_swiglu(gate: Tensor, up: Tensor, gate_plus: LowRank = None, up_plus: LowRank = None) -> Tensor:
    """Do what `swiglu` says with PyTorch's operations."""
    return (F.silu(_plus(gate, gate_plus)) * _plus(up, up_plus)).to(gate.dtype)


def reference_swiglu_backward_(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    gate_plus: LowRank = None,
    up_plus: LowRank = None,
    grad_plus: LowRank = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `swiglu_backward_` says with PyTorch's operations."""
    gates, ups, grads = _plus(gate, gate_plus), _plus(up, up_plus), _plus(grad, grad_plus)
    sigmoid = gates.sigmoid()
    silu = gates * sigmoid
    results = grads * ups * sigmoid * (1 + gates * (1 - sigmoid)), grads * silu, silu * ups
    return gate.copy_(results[0]), up.copy_(results[1]), grad.copy_(results[2])


def reference_swiglu_adapters_backward_(
    gate: Tensor, up: Tensor, grad: Tensor, gate_plus: Pair, up_plus: Pair, grad_plus: Pair
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do what `swiglu_adapters_backward_` says with PyTorch's operations."""
    of_gate, of_up, activation = reference_swiglu_backward_(gate, up, grad, gate_plus, up_plus, grad_plus)
    of_gate_b, of_up_b = of_gate.float().T @ gate_plus[0].float(), of_up.float().T @ up_plus[0].float()
    return of_gate, of_up, of_gate_b, of_up_b, grad_plus[0].float().T @ activation.float()


def reference_add_(y: Tensor, plus: LowRank, residual: Tensor) -> Tensor:
    """Do what `add_` says with PyTorch's operations."""
    return y.copy_(_plus(y, plus) + residual)


def reference_scale_columns_(y: Tensor, plus: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `scale_columns_` says with PyTorch's operations."""
    values = _plus(y, plus) * scale
    return y.copy_(values if bias is None else values + bias)


def reference_scaled_gradient(grad: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Do what `scaled_gradient` says with PyTorch's operations."""
    plain = y.float() if bias is None else y.float() - bias
    return (grad * scale).to(grad.dtype), (grad.float() * plain).sum(dim=0)


def _plus(base: Tensor, pair: LowRank) -> Tensor:
    return base.float() if pair is None else base.float() + pair[0].float() @ pair[1].float().T


def reference_cross_entropy_(
    logits: Tensor, targets: Tensor, with_gradient: bool, gradient_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Do what `cross_entropy_` says with PyTorch's operations."""
    values = logits.float()
    normalizer = values.logsumexp(dim=1, keepdim=True)
    places = targets[:, None]
    losses = (normalizer - values.gather(1, places)).squeeze(1)
    hits = values.argmax(dim=1) == targets
    if with_gradient:
        gradient = (values - normalizer).exp_()
        gradient.scatter_add_(1, places, gradient.new_full((1, 1), -1.0).expand_as(places))
        logits.copy_(gradient.mul_(gradient_scale))
    return losses, hits
