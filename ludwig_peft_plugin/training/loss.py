"""Cross-entropy over the target tokens of a micro-batch, and the sums that metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.forward import frozen_matrix, output_layer, target_logits, target_states
from ludwig_peft_plugin.engine.loss import chunked_cross_entropy, fused_linear_cross_entropy, load_kernels


@dataclass(frozen=True)
class TargetLoss:
    """Sums over the target tokens of a micro-batch; all tensors are on the model's device.

    Attributes:
        loss_sum: summed cross-entropy in nats, scalar, float32; carries the gradient.
        row_log_likelihood: summed log-probability of each row's target, shape (B,), float32, detached.
        row_tokens: target tokens of each row, shape (B,).
        row_correct: target tokens of each row that were also the most likely ones, shape (B,).
        last_correct: whether each row's last target token was the most likely one, shape (B,), bool.
    """

    loss_sum: Tensor
    row_log_likelihood: Tensor
    row_tokens: Tensor
    row_correct: Tensor
    last_correct: Tensor


def target_loss(model: Any, batch: MicroBatch) -> TargetLoss:
    r"""Run `model` on `batch` and return \(-\sum_t \log p(y_t \mid y_{<t}, x)\) over the target tokens.

    Logits are made at the positions that predict a target, so the prompt costs no vocabulary-sized memory. The sum is
    left unweighted: dividing by the target tokens of the whole optimiser step makes the step independent of how rows
    were grouped.
    """
    head = output_layer(model)
    if head is None or not len(batch.targets):
        logits = target_logits(model, batch).float()
        all_losses = F.cross_entropy(logits, batch.targets, reduction="none")
        loss_sum, losses = all_losses.sum(), all_losses.detach()
        hits = logits.detach().argmax(dim=-1) == batch.targets
    else:
        weight = frozen_matrix(head)
        if weight is not None:
            load_kernels(weight, len(batch.targets))
        states = target_states(model, batch)
        if weight is not None and weight.dtype == states.dtype:
            loss_sum, losses, hits = fused_linear_cross_entropy(states, weight, batch.targets)
        else:
            loss_sum, losses, hits = chunked_cross_entropy(head, states, batch.targets)
    return _by_row(batch, loss_sum, losses, hits)


def _by_row(batch: MicroBatch, loss_sum: Tensor, losses: Tensor, hits: Tensor) -> TargetLoss:
    """Add up the targets of each row. `target_rows` ascends, so a row's last target is where the next row begins."""
    owners, rows = batch.target_rows, len(batch.rows)
    nothing = torch.zeros(rows, dtype=torch.int64, device=losses.device)
    last = torch.ones_like(hits)
    last[:-1] = owners[1:] != owners[:-1]
    return TargetLoss(
        loss_sum=loss_sum,
        row_log_likelihood=-torch.zeros(rows, device=losses.device).index_add(0, owners, losses),
        row_tokens=nothing.index_add(0, owners, torch.ones_like(owners)),
        row_correct=nothing.index_add(0, owners, hits.long()),
        last_correct=nothing.index_add(0, owners, (hits & last).long()) > 0,
    )
