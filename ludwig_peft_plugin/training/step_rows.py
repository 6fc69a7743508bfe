"""A dataset handed out as whole optimiser steps, as Ludwig's training loop asks for batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from ludwig_peft_plugin.data.batcher import TokenBatcher
from ludwig_peft_plugin.data.batches import StepBatch, read_lengths
from ludwig_peft_plugin.data.packing import token_capacity
from ludwig_peft_plugin.data.prefetch import Prefetch

if TYPE_CHECKING:
    from ludwig_peft_plugin.training.trainer import PeftTrainer


class StepRows:
    """A dataset whose batches are whole optimiser steps, as Ludwig's loop asks for them.

    Attributes:
        capacity: tokens of a micro-batch at most; None where a micro-batch is a number of rows.
        skip_steps: steps of the first epoch that an interrupted run has done.
        batcher: the batcher of the running training.
    """

    def __init__(self, dataset: Any, trainer: PeftTrainer) -> None:
        """Read from the trainer's config how rows are grouped.

        Raises:
            DataError: a row is longer than a micro-batch may be.
        """
        config = trainer.config
        self.dataset = dataset
        self.accumulation = trainer.gradient_accumulation_steps
        self.packing = bool(config.packing)
        self.compiled = bool(config.compile)
        self.capacity = token_capacity(
            read_lengths(dataset),
            config.tokens_per_batch,
            self.packing,
            trainer.batch_size,
            trainer.model.config_obj.preprocessing.global_max_sequence_length,
        )
        self.skip_steps = 0
        self.batcher: TokenBatcher | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def size(self) -> int:
        """Number of rows, by Ludwig's name."""
        return len(self.dataset)

    @contextmanager
    def initialize_batcher(
        self, batch_size: int, should_shuffle: bool = True, random_seed: int = 0, **_: Any
    ) -> Iterator[TokenBatcher]:
        """Yield the batcher of this run. No row is left out: Ludwig's `ignore_last` is not applied."""
        self.batcher = TokenBatcher(
            self.dataset,
            batch_size,
            accumulation=self.accumulation,
            shuffle=should_shuffle,
            seed=random_seed,
            capacity=self.capacity,
            packing=self.packing,
            fixed_length=self.compiled,  # compiled code is made for one length
            skip_steps=self.skip_steps,
        )
        yield self.batcher

    @property
    def steps_into_epoch(self) -> int:
        """Optimiser steps done in the running epoch; 0 when it is over."""
        return 0 if self.batcher is None or self.batcher.last_batch() else self.batcher.step


class SeededBatches:
    """The batcher of one epoch, whose batches are made ahead, seeding each step from the run's seed and its number.

    Dropout then depends on nothing that came before, so a resumed run repeats what an uninterrupted one does.
    """

    def __init__(self, batcher: TokenBatcher, trainer: PeftTrainer) -> None:
        self._batcher = batcher
        self._trainer = trainer
        self.steps_per_epoch = batcher.steps_per_epoch
        self._batches = Prefetch(batcher.make, range(batcher.step, batcher.steps_per_epoch), trainer.device)

    def next_batch(self) -> StepBatch:
        with record_function("data"):
            torch.manual_seed((self._trainer.random_seed + 1) * 1_000_003 + self._trainer._progress.steps)
            batch = next(self._batches)
            self._batcher.step += 1
            return batch

    def last_batch(self) -> bool:
        return self._batcher.last_batch()

    def close(self) -> None:
        """End the thread that makes the batches."""
        self._batches.close()
