"""Hands out the optimiser steps of an epoch, as Ludwig's training loop asks for them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from ludwig.data.batcher.base import Batcher

from ludwig_peft_plugin.data.batches import Room, StepBatch, collate, read_lengths, target_counts
from ludwig_peft_plugin.data.packing import Plan, by_best_fit, by_count, by_tokens

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset

logger = logging.getLogger(__name__)


class TokenBatcher(Batcher):
    """The optimiser steps of an epoch, in an order that depends on the seed and the epoch alone.

    A step is `accumulation` micro-batches of `batch_size` rows each, drawn anew in each epoch. With a `capacity`, a
    micro-batch is rows of which at most so many tokens are read; then the same rows go together in every epoch and
    only the order of the micro-batches changes, so that each epoch has as many steps as the first. The last, smaller
    step of an epoch is kept.

    Attributes:
        step: how many steps of the epoch have been handed out.
        batch_size: rows of a micro-batch, where there is no capacity.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        *,
        accumulation: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        capacity: int | None = None,
        packing: bool = False,
        fixed_length: bool = False,
        skip_steps: int = 0,
    ) -> None:
        """Start the first epoch.

        Args:
            dataset: where the rows come from.
            batch_size: rows of a micro-batch, where there is no capacity.
            accumulation: micro-batches of a step.
            shuffle: whether the order is random; else it is the dataset's.
            seed: seed of the order.
            capacity: tokens that a micro-batch reads at most, not less than the longest row; None counts rows.
            packing: fill micro-batches as far as whole rows can, instead of taking rows as they come.
            fixed_length: bring every micro-batch up to `capacity` tokens, with filler that carries no loss.
            skip_steps: steps at the start of the next epoch that are left out, to go on in the middle of one.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.shuffle = shuffle
        self.seed = seed
        self.capacity = capacity
        self._length = capacity if fixed_length else None
        self._skip_steps = skip_steps
        self.step = 0
        self._room = None
        if capacity is None:
            self._plan = by_count(np.arange(len(dataset)), batch_size)
        else:
            lengths = read_lengths(dataset)
            self._plan = self._fixed_plan(lengths, packing)
            if len(dataset):
                sequences = int(np.diff(self._plan.starts).max())
                self._room = Room(capacity, sequences, int(lengths.max()), self._most_targets())
        self._order = np.arange(len(self._plan))

    def _fixed_plan(self, lengths: np.ndarray, packing: bool) -> Plan:
        assert self.capacity is not None
        order = self._shuffled(len(lengths), self.seed)
        plan = (by_best_fit if packing else by_tokens)(lengths, order, self.capacity)
        filled = 100 * int(lengths.sum()) / max(1, len(plan) * self.capacity)
        name = "packing" if packing else "tokens_per_batch"
        message = "%s: %s rows in %s batches of %s tokens, %.1f%% filled"
        logger.info(message, name, f"{len(lengths):,}", f"{len(plan):,}", f"{self.capacity:,}", filled)
        return plan

    def _most_targets(self) -> int:
        """Return how many tokens carry loss in the group that has the most of them."""
        of_groups = np.add.reduceat(target_counts(self.dataset, self._plan.rows), self._plan.starts[:-1])
        return int(of_groups.max())

    def _shuffled(self, count: int, seed: int | tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(seed).permutation(count) if self.shuffle else np.arange(count)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the last, smaller one included."""
        return -(-len(self._plan) // self.accumulation)

    def set_epoch(self, epoch: int, batch_size: int) -> None:
        """Start `epoch` (from 0), with `batch_size` rows in a micro-batch where there is no capacity."""
        if self.capacity is None:
            self.batch_size = batch_size
            self._plan = by_count(self._shuffled(len(self.dataset), (self.seed, epoch)), batch_size)
            self._order = np.arange(len(self._plan))
        else:
            self._order = self._shuffled(len(self._plan), (self.seed, epoch))
        self.step, self._skip_steps = self._skip_steps, 0

    def make(self, step: int) -> StepBatch:
        """Return step number `step` of the epoch; the position in the epoch is neither read nor changed."""
        groups = self._order[step * self.accumulation : (step + 1) * self.accumulation]
        plan, length, room = self._plan, self._length, self._room
        return StepBatch.of([collate(self.dataset, plan[int(group)], length=length, room=room) for group in groups])

    def next_batch(self) -> StepBatch:
        """Return the next optimiser step."""
        if self.last_batch():
            raise StopIteration
        batch = self.make(self.step)
        self.step += 1
        return batch

    def last_batch(self) -> bool:
        """Return whether the epoch is over."""
        return self.step >= self.steps_per_epoch
