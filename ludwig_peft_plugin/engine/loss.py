"""Cross-entropy from hidden states and the output matrix, without ever holding the logits of all targets.

    L = sum_i [ log sum_v exp(h_i . w_v) - h_i . w_{y_i} ],      dL/dh_i = sum_v (softmax_v - [v = y_i]) w_v

Logits are made for some of the targets at a time, turned into their gradient in place, and multiplied back. Only
dL/dh, of the size of the hidden states, is kept for the backward pass. The output matrix is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ludwig_peft_plugin.engine.elementwise import cross_entropy_

LOGITS_BYTES = 512 * 1024**2
"""Memory the logits of one chunk take: large enough for full matrix speed, small beside the activations."""

CHUNK_STEP = 512
"""A whole chunk has a multiple of so many rows: in others, products leave more of a GPU idle in their last wave."""

ROWS_OF_A_CHUNK = 4096
"""The most targets of a chunk: with a small vocabulary there would otherwise be thousands of sizes to load."""

ROWS_OF_A_TRAINED_HEAD = 1024

ROW_STEP = 128
"""On a GPU the last chunk is filled up to a multiple of this. No two batches have equally many targets, matrix products
have a kernel for every few sizes, and when one is first used the driver loads it, for which all work has to end.
`load_kernels` uses the sizes that are left beforehand."""

_loaded: dict[tuple[Any, ...], int] = {}  # the largest size so far, by what decides on the kernels of an output matrix

FLOAT16_SCALE = 1024.0
"""float16 cannot hold the small entries of a softmax gradient; they are computed this much larger."""


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = ctx.needs_input_grad[0]
        scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        count = len(hidden)
        hidden = filled_up(hidden)
        gradient = torch.empty_like(hidden) if with_gradient else None
        losses, hits = [], []
        for start in range(0, count, size := rows_per_chunk(weight)):
            rows = slice(start, start + size)
            logits = hidden[rows] @ weight.T
            wanted = targets[rows]
            chunk_losses, chunk_hits = cross_entropy_(
                logits[: len(wanted)], wanted, with_gradient=with_gradient, gradient_scale=scale
            )
            losses.append(chunk_losses)
            hits.append(chunk_hits)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
            del logits  # before the next chunk's are made
        all_losses = torch.cat([hidden.new_zeros(0, dtype=torch.float32), *losses])
        all_hits = torch.cat([torch.zeros(0, dtype=torch.bool, device=hidden.device), *hits])
        ctx.scale = scale
        if gradient is not None:
            ctx.save_for_backward(gradient[:count])
        ctx.mark_non_differentiable(all_losses, all_hits)
        return all_losses.sum(), all_losses, all_hits

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = upstream[0] / ctx.scale
        return (gradient * factor).to(gradient.dtype), None, None


def rows_per_chunk(weight: Tensor) -> int:
    """Return for how many targets logits are made at a time."""
    rows = min(LOGITS_BYTES // (len(weight) * weight.element_size()), ROWS_OF_A_CHUNK)
    return max(ROW_STEP, rows // CHUNK_STEP * CHUNK_STEP)


def load_kernels(weight: Tensor, targets: int) -> None:
    """Have the GPU's driver load the kernels for the sizes of a last chunk that have not been used so far.

    To be called before a forward pass, when the memory of its activations is still free for the logits made here. They
    are those of twice as many targets as the batch has, so that a somewhat larger one later brings no new sizes.

    Args:
        weight: the output matrix, shape (V, H), without gradient. If it is not on a GPU, nothing is done.
        targets: targets of the batch.
    """
    if weight.device.type != "cuda":
        return
    with_gradient = torch.is_grad_enabled()
    kind = (weight.shape, weight.dtype, weight.device, with_gradient)
    sizes = _sizes_to_load(_loaded.get(kind, 0), targets, rows_per_chunk(weight))
    for rows in sizes:
        logits = weight.new_zeros(rows, weight.shape[1]) @ weight.T
        if with_gradient:
            logits @ weight
        _loaded[kind] = rows


def _sizes_to_load(before: int, targets: int, largest: int) -> range:
    """Return the sizes above `before` for up to twice the targets, but not above that of a whole chunk."""
    return range(before + ROW_STEP, min(2 * targets, largest) + ROW_STEP, ROW_STEP)


def filled_up(hidden: Tensor) -> Tensor:
    """Return `hidden`, shape (M, H), with rows of zeros behind it up to a multiple of `ROW_STEP`; on a CPU as it is."""
    return F.pad(hidden, (0, 0, 0, -len(hidden) % ROW_STEP)) if hidden.is_cuda else hidden


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, each target's loss and whether each target was the most likely token.

    Args:
        hidden: final hidden states at the targets' positions, shape (M, H).
        weight: the output matrix, shape (V, H), without gradient, in the dtype of `hidden`.
        targets: shape (M,), int64.

    Returns:
        The loss in nats (scalar, float32, carries the gradient), losses (M,) float32 and hits (M,) bool, both detached.
    """
    total, losses, hits = _FusedLinearCrossEntropy.apply(hidden, weight, targets)
    return total, losses, hits


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `fused_linear_cross_entropy`, with an output layer that is trained or adapted.

    Its gradients come from autograd; the logits of each chunk are computed again in the backward pass.

    Args:
        head: maps hidden states (m, H) to logits (m, V).
        hidden: final hidden states at the targets' positions, shape (M, H).
        targets: shape (M,), int64.
    """

    def losses_of(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states)[: len(wanted)].float()
        return F.cross_entropy(logits, wanted, reduction="none"), logits.detach().argmax(dim=-1) == wanted

    parts = [
        checkpoint(losses_of, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(
            filled_up(hidden).split(ROWS_OF_A_TRAINED_HEAD), targets.split(ROWS_OF_A_TRAINED_HEAD), strict=True
        )
    ]
    losses = torch.cat([losses for losses, _ in parts])
    return losses.sum(), losses.detach(), torch.cat([hits for _, hits in parts])
