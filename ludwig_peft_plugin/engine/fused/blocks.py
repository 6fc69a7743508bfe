r"""The three parts of a Llama-like decoder layer, each an autograd function with a hand-written backward pass.

    q, k, v = rotate(W_q n), rotate(W_k n), W_v n,   n = rms_norm(x)
    x'      = x + W_o attention(q, k, v)
    x''     = x' + W_down swiglu(W_gate n', W_up n'),   n' = rms_norm(x')

where every W is a frozen linear layer with or without an adapter (group.py). Between forward and backward they keep
the two residual states x and x', what attention keeps, and the outputs of gate and up; the normalised states and the
activation are computed again, for a few passes over memory instead of half as much memory again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.engine.elementwise import (
    add_,
    rms_norm,
    rms_norm_backward,
    rotate,
    swiglu,
    swiglu_adapters_backward_,
    swiglu_backward_,
)
from ludwig_peft_plugin.engine.fused.group import Kept, LinearGroup


@dataclass
class Norm:
    """A frozen RMSNorm: its weight (H,) and epsilon."""

    weight: Tensor
    eps: float


@dataclass
class AttentionInput:
    """What makes queries, keys and values of the residual state."""

    norm: Norm
    group: LinearGroup  # q, k, v
    head_size: int


@dataclass
class FeedForward:
    """The gated feed-forward block."""

    norm: Norm
    gate_up: LinearGroup
    down: LinearGroup


class QueryKeyValue(torch.autograd.Function):
    """x (T, H), cos and sin (T, d) -> q (T, heads, d), k, v (T, kv_heads, d), and x itself for the residual sum.

    Without cos and sin (None) the rotation is left to the attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        part: AttentionInput,
        training: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normed, scales = rms_norm(x, part.norm.weight, part.norm.eps)
        outputs, kept = part.group.forward(normed, training=training)
        q, k, v = (output.view(len(x), -1, part.head_size) for output in outputs)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        ctx.part = part
        _keep(ctx, kept, x, scales, cos, sin, *((q, k, v) if part.group.uses_dora else ()))
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        part: AttentionInput = ctx.part
        kept, (x, scales, cos, sin, *outputs) = _kept(ctx)
        tokens = len(x)

        def unrotated(heads: Tensor) -> Tensor:
            return heads.reshape(tokens, -1) if cos is None else rotate(heads, cos, sin, inverse=True).view(tokens, -1)

        of_q, of_k, of_v = unrotated(grads[0]), unrotated(grads[1]), grads[2].reshape(tokens, -1)
        plain = None
        if outputs:
            q, k, v = outputs
            plain = [unrotated(q), unrotated(k), v.view(tokens, -1)]
        needed = ctx.needs_input_grad[0]
        of_norm, grad_h, others = part.group.input_gradient(kept, [of_q, of_k, of_v], plain, needed=needed)
        of_parameters = _adapter_gradients(part.group, part.norm, x, scales, kept, grad_h, others)
        of_x = rms_norm_backward(x, part.norm.weight, part.norm.eps, of_norm, grads[3]) if of_norm else None
        return (of_x, None, None, None, None, *of_parameters)


class OutputProjection(torch.autograd.Function):
    """attention (T, heads * d) and the residual state x (T, H) -> x + W_o attention."""

    @staticmethod
    def forward(
        ctx: Any, attention: Tensor, x: Tensor, group: LinearGroup, training: bool, *parameters: Tensor
    ) -> Tensor:
        (output,), kept = group.forward(attention, training=training, add=False)
        ctx.group = group
        _keep(ctx, kept, attention, *((output,) if group.uses_dora else ()))
        return output + x if group.uses_dora else add_(output, kept.plus(0), x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        group: LinearGroup = ctx.group
        kept, (attention, *outputs) = _kept(ctx)
        grad = grads[0].contiguous()
        of_attention, grad_h, others = group.input_gradient(kept, [grad], outputs, needed=ctx.needs_input_grad[0])
        of_parameters = group.adapter_gradients(attention, kept, grad_h, others)
        return (of_attention[0] if of_attention else None, grad, None, None, *of_parameters)


class GatedFeedForward(torch.autograd.Function):
    """The residual state x (T, H) -> x + W_down swiglu(W_gate n, W_up n), n = rms_norm(x).

    The backward pass writes over the outputs of gate and up that it kept, so it can run once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: FeedForward, training: bool, read: bool, *parameters: Tensor) -> Tensor:
        normed, scales = rms_norm(x, part.norm.weight, part.norm.eps)
        (gate, up), kept = part.gate_up.forward(normed, training=training, add=False)
        activation = swiglu(gate, up, kept.plus(0), kept.plus(1))
        ctx.part, ctx.spent = part, False
        if not read and not part.down.uses_dora:
            ctx.kept_down = part.down.keep(activation, training=training)
            _keep(ctx, kept, x, scales, gate, up)
            return torch.empty_like(x)
        (output,), kept_down = part.down.forward(activation, training=training, add=False)
        ctx.kept_down = kept_down
        _keep(ctx, kept, x, scales, gate, up, *((output,) if part.down.uses_dora else ()))
        return output + x if part.down.uses_dora else add_(output, kept_down.plus(0), x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError("the backward pass of a fused feed-forward block cannot run twice")
        ctx.spent = True
        part, kept_down = ctx.part, ctx.kept_down
        kept, (x, scales, gate, up, *outputs) = _kept(ctx)
        grad = grads[0].contiguous()
        add = kept_down.dropped  # dropout lies between A's gradient and the activation's
        (of_activation,), grad_h, others = part.down.input_gradient(kept_down, [grad], outputs, needed=True, add=add)
        still_to_add = None if add else kept_down.plus_input_gradient(grad_h)
        of_outputs = [gate.clone(), up.clone()] if part.gate_up.uses_dora else None
        gate_plus, up_plus, of_b = kept.plus(0), kept.plus(1), None
        if gate_plus is not None and up_plus is not None and still_to_add is not None:
            of_gate, of_up, *of_b, of_a = swiglu_adapters_backward_(
                gate, up, of_activation, gate_plus, up_plus, still_to_add
            )
            of_down = [of_a, *others]
        else:
            of_gate, of_up, activation = swiglu_backward_(gate, up, of_activation, gate_plus, up_plus, still_to_add)
            of_down = part.down.adapter_gradients(activation, kept_down, grad_h, others)
            del activation
        del of_activation
        needed = ctx.needs_input_grad[0]
        of_norm, grad_h, others = part.gate_up.input_gradient(
            kept, [of_gate, of_up], of_outputs, needed=needed, of_b=of_b
        )
        del of_gate, of_up
        of_gate_up = _adapter_gradients(part.gate_up, part.norm, x, scales, kept, grad_h, others)
        of_x = rms_norm_backward(x, part.norm.weight, part.norm.eps, of_norm, grad) if of_norm else None
        return (of_x, None, None, None, *of_gate_up, *of_down)


def _adapter_gradients(
    group: LinearGroup,
    norm: Norm,
    x: Tensor,
    scales: Tensor,
    kept: Kept,
    grad_h: Tensor | None,
    others: list[Tensor],
) -> list[Tensor]:
    """Return the gradients of a group's adapters whose input was the normalised x, shape (T, H).

    The gradient of A, g^T n with n = scales x w, is (scales g)^T x w: n itself is not made again. Except for dropout,
    and in float16, where scales g may overflow.
    """
    if kept.dropped or x.dtype == torch.float16:
        normed, _ = rms_norm(x, norm.weight, norm.eps)
        return group.adapter_gradients(normed, kept, grad_h, others)
    # With `out`, the float32 product is rounded as it is made, not by another kernel.
    scaled = None if grad_h is None else torch.mul(grad_h, scales[:, None], out=torch.empty_like(grad_h))
    return group.adapter_gradients(x, kept, scaled, others, weight=norm.weight)


def _keep(ctx: Any, kept: Kept, *tensors: Tensor | None) -> None:
    """Keep the inputs and outputs of the function as autograd wants it, and what only the function knows as it is."""
    ctx.kept = kept
    ctx.save_for_backward(*tensors)


def _kept(ctx: Any) -> tuple[Kept, tuple[Tensor, ...]]:
    return ctx.kept, ctx.saved_tensors
