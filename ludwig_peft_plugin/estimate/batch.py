"""The largest micro-batch that a config can lead to: how many tokens, in how many sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.model.base_model import context_length

ROWS, TOKENS = "rows", "tokens"
EVALUATION = "trainer.eval_batch_size"


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch as far as memory depends on it.

    Attributes:
        tokens: tokens of all sequences.
        sequences: how many there are.
        longest: tokens of the longest.
        targets: tokens that carry loss.
        accumulated: whether micro-batches of the same optimiser step have left their gradients before.
    """

    tokens: int
    sequences: int
    longest: int
    targets: int
    accumulated: bool = False

    @classmethod
    def of(cls, batch: MicroBatch, *, accumulated: bool = False) -> BatchShape:
        """Return the shape of a micro-batch."""
        sequences = len(batch.cu_seqlens) - 1
        return cls(len(batch.input_ids), sequences, batch.max_length, batch.target_tokens, accumulated)

    def on_meta(self) -> MicroBatch:
        """Return a micro-batch of this shape without data."""

        def empty(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        return MicroBatch(
            rows=np.arange(self.sequences),
            input_ids=empty(self.tokens),
            position_ids=empty(self.tokens),
            cu_seqlens=empty(self.sequences + 1, torch.int32),
            max_length=self.longest,
            targets=empty(self.targets),
            target_positions=empty(self.targets),
            target_rows=empty(self.targets),
            tokens=self.tokens,
            task_ids=empty(self.sequences),
        )


@dataclass(frozen=True)
class BatchPlan:
    """How micro-batches follow from a config.

    Attributes:
        unit: what the size of a micro-batch counts: ROWS (`batch_size`) or TOKENS (`tokens_per_batch`).
        size: rows or tokens of a micro-batch; None for `batch_size: auto`.
        accumulation: micro-batches of an optimiser step.
        row_tokens: tokens of the longest row that can occur.
        limit: the option that bounds rows to this, for messages.
        target_share: the part of a row's tokens that may carry loss.
        option: the option that sets `size`.
    """

    unit: str
    size: int | None
    accumulation: int
    row_tokens: int
    limit: str
    target_share: float = 1.0
    option: str = "trainer.batch_size"

    def shape(self, size: int) -> BatchShape:
        """Return the largest micro-batch of `size` rows or tokens."""
        tokens = size * self.row_tokens if self.unit == ROWS else size
        longest = min(self.row_tokens, tokens)
        sequences = -(-tokens // longest)
        # The first token of a row is never predicted.
        targets = max(1, min(tokens - sequences, round(tokens * self.target_share)))
        return BatchShape(tokens, sequences, longest, targets, self.accumulation > 1)

    def matching(self, shape: BatchShape) -> tuple[BatchPlan, int]:
        """Return the plan, and the size, that lead to the tokens of a micro-batch that was met."""
        share = shape.targets / max(1, shape.tokens)
        if self.unit == TOKENS:
            return replace(self, row_tokens=shape.longest, target_share=share), shape.tokens
        return replace(self, row_tokens=-(-shape.tokens // shape.sequences), target_share=share), shape.sequences

    def for_evaluation(self, trainer: Any) -> BatchPlan:
        """Return how batches of an evaluation come about."""
        rows = trainer.eval_batch_size
        size = rows if isinstance(rows, int) and rows else self.size
        option = self.option if size == self.size else EVALUATION
        return replace(self, unit=self.unit if size == self.size else ROWS, size=size, accumulation=1, option=option)


def batch_plan(
    config_obj: Any, model_config: Any, row_tokens: int | None = None, target_share: float = 1.0
) -> BatchPlan:
    """Return how the micro-batches of a config come about.

    Args:
        config_obj: the config.
        model_config: the base's transformers config.
        row_tokens: tokens of the longest row of the data where that is known.
        target_share: the part of a row's tokens that carries loss.
    """
    context = context_length(model_config)
    most = config_obj.preprocessing.global_max_sequence_length
    limit = "the model's context" if not most or most > context else "preprocessing.global_max_sequence_length"
    longest = min(most or context, context)
    if row_tokens is not None and row_tokens < longest:
        longest, limit = row_tokens, "the longest row given"
    size, accumulation = _size_and_accumulation(config_obj.trainer)
    budget = getattr(config_obj.trainer, "tokens_per_batch", None)
    return BatchPlan(
        unit=TOKENS if budget else ROWS,
        size=budget or size,
        accumulation=accumulation,
        row_tokens=longest,
        limit=limit,
        target_share=target_share,
        option="trainer.tokens_per_batch" if budget else "trainer.batch_size",
    )


def _size_and_accumulation(trainer: Any) -> tuple[int | None, int]:
    """Return `batch_size` and `gradient_accumulation_steps`, of which one may follow from `effective_batch_size`."""
    size, steps, effective = trainer.batch_size, trainer.gradient_accumulation_steps, trainer.effective_batch_size
    if isinstance(effective, int) and isinstance(size, int):
        return size, max(1, effective // size)
    if isinstance(effective, int) and isinstance(steps, int):
        return max(1, effective // steps), steps
    return size if isinstance(size, int) else None, steps if isinstance(steps, int) else 1
