"""Measure how large a batch can be (`batch_size: auto`), on the longest rows of the data."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ludwig.constants import MAX_BATCH_SIZE_DATASET_FRACTION, MAX_CPU_BATCH_SIZE
from ludwig.trainers.trainer import Trainer
from ludwig.utils.batch_size_tuner import BatchSizeEvaluator

from ludwig_peft_plugin.data.batches import MicroBatch, StepBatch, collate, read_lengths
from ludwig_peft_plugin.rounding import rounded_up
from ludwig_peft_plugin.training.checkpoint import trained_parameters

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset
    from ludwig_peft_plugin.training.trainer import PeftTrainer

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.9  # of the device's memory; the rest is for fragmentation and evaluation
MAX_CPU_TOKENS = 8192
TOKEN_UNIT = 128  # token counts are multiples of it, as matrix kernels like them
TIMED_STEPS, TIMED_SECONDS = 3, 2.0


@dataclass(frozen=True)
class Measurement:
    """A size that ran.

    Attributes:
        size: rows, or tokens, of the micro-batch.
        speed: tokens of the data per second.
        peak: bytes allocated on the device at most; 0 on a CPU.
    """

    size: int
    speed: float
    peak: int


def largest_fast_size(
    measure: Callable[[int], Measurement], smallest: int, largest: int, unit: int, before: int, budget: int | None
) -> Measurement:
    """Return the fastest size that stays within `budget`, doubling until memory ends or throughput falls.

    Args:
        measure: runs a size; raises torch.OutOfMemoryError where it does not fit.
        smallest: the first size.
        largest: the last size that may be tried.
        unit: sizes are multiples of this, beside `smallest`.
        before: bytes allocated before any step.
        budget: bytes that may be allocated; None on a CPU.

    Raises:
        torch.OutOfMemoryError: not even `smallest` runs.
    """
    measured = [measure(smallest)]
    while measured[-1].size < largest:
        last = measured[-1]
        size = min(2 * last.size, largest)
        if budget is not None:
            size = min(size, _size_within(budget, measured, before) // unit * unit)
        if size < last.size + max(unit, last.size // 8):
            break  # too little more to gain
        try:
            measured.append(measure(size))
        except torch.OutOfMemoryError:
            logger.debug("batch_size auto: size %d does not fit", size)
            break
        if measured[-1].speed < last.speed:
            break
    fitting = [m for m in measured if budget is None or m.peak <= budget] or measured[:1]
    return max(fitting, key=lambda m: m.speed)


def _size_within(budget: int, measured: list[Measurement], before: int) -> int:
    """Return the size that would need `budget` bytes, if memory goes on growing as it did."""
    last = measured[-1]
    size, peak = (measured[-2].size, measured[-2].peak) if len(measured) > 1 else (0, before)
    growth = max((last.peak - peak) / (last.size - size), 1e-9)
    return int(min(last.size + (budget - last.peak) / growth, 2**40))


class BatchSizeSearch(BatchSizeEvaluator):
    """Runs steps of growing size on the longest rows, so that no later batch needs more memory."""

    def __init__(self, trainer: PeftTrainer, dataset: TokenDataset, *, train: bool) -> None:
        self.trainer = trainer
        self.dataset = dataset
        self.train = train
        self.packing = train and bool(trainer.config.packing)
        lengths = read_lengths(dataset)
        self._longest = np.argsort(-lengths, kind="stable")
        self._ends = np.cumsum(lengths[self._longest])
        self._device = torch.device(trainer.device)

    def select_best_batch_size(
        self,
        dataset_len: int,
        max_batch_size: int | None = None,
        max_trials: int = 20,
        is_coordinator: bool | None = True,
        global_max_sequence_length: int | None = None,
    ) -> int:
        """Return the rows of a micro-batch; with packing 1, and the tokens are set as `tokens_per_batch`."""
        rows = max(1, min(int(MAX_BATCH_SIZE_DATASET_FRACTION * dataset_len), max_batch_size or dataset_len))
        smallest, largest, unit = 1, rows, 1
        if self.packing:
            longest, unit = int(self._ends[0]), TOKEN_UNIT
            smallest = rounded_up(longest, TOKEN_UNIT)
            tokens = min(int(MAX_BATCH_SIZE_DATASET_FRACTION * self._ends[-1]), (max_batch_size or 1) * longest)
            if self._device.type == "cpu":
                tokens = min(tokens, MAX_CPU_TOKENS)
            largest = max(smallest, tokens)
        elif self._device.type == "cpu":
            largest = min(largest, MAX_CPU_BATCH_SIZE)
        before, budget, total = self._memory()
        best = largest_fast_size(self._measure, smallest, largest, unit, before, budget)
        name = "tokens_per_batch" if self.packing else "batch_size" if self.train else "eval_batch_size"
        memory = f", {100 * best.peak / total:.0f}% of the memory at peak" if total else ""
        logger.info("batch_size auto: %s %d (%.0f tokens/s measured%s)", name, best.size, best.speed, memory)
        if not self.packing:
            return best.size
        self.trainer.config.tokens_per_batch = best.size
        return 1

    def _memory(self) -> tuple[int, int | None, int]:
        """Return the bytes allocated now, those that may be, and those there are; on a CPU 0, None and 0."""
        if self._device.type != "cuda":
            return 0, None, 0
        free, _ = torch.cuda.mem_get_info(self._device)
        total = free + torch.cuda.memory_reserved(self._device)
        return torch.cuda.memory_allocated(self._device), int(MEMORY_SHARE * total), total

    def _measure(self, size: int) -> Measurement:
        batch = self._batch(size)
        cuda = self._device.type == "cuda"
        try:
            self._step(batch)  # the first one of a size allocates, compiles and chooses kernels
            if cuda:
                torch.cuda.reset_peak_memory_stats(self._device)
                torch.cuda.synchronize(self._device)
            started, steps = time.perf_counter(), 0
            while steps == 0 or (steps < TIMED_STEPS and time.perf_counter() - started < TIMED_SECONDS):
                self._step(batch)
                steps += 1
            if cuda:
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated(self._device) if cuda else 0
        finally:
            self._clear()
        logger.debug("batch_size auto: size %d, %.0f tokens/s, %d bytes", size, batch.tokens * steps / seconds, peak)
        return Measurement(size, batch.tokens * steps / seconds, peak)

    def _batch(self, size: int) -> MicroBatch:
        if not self.packing:
            return collate(self.dataset, self._longest[:size])
        count = max(1, int(np.searchsorted(self._ends, size, side="right")))
        return collate(self.dataset, self._longest[:count], length=size if self.trainer.config.compile else None)

    def _step(self, batch: MicroBatch) -> None:
        if self.train:
            self.trainer.train_step(StepBatch.of([batch]))
        else:
            with torch.no_grad():
                self.trainer.model(batch.to(self._device))

    def _clear(self) -> None:
        """Free what a step, also one that failed, has left."""
        self.trainer.model.reset_metrics()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class BatchSizeTuning(Trainer):
    """The part of the trainer that carries out `batch_size: auto` and `eval_batch_size: auto`.

    Attributes:
        tuned: whether the size of training batches was measured, not given.
    """

    model: Any
    tuned = False

    def tune_batch_size(self, config: Any, training_set: Any, *args: Any, **kwargs: Any) -> int:
        """Find the largest batch that fits; the model, the optimiser and random numbers come out as they were."""
        self._attach_adapter_from_data(training_set)
        self._tuning_set = training_set
        self.tuned = self.tuned or kwargs.get("tune_for_training", True)
        with self._kept():
            # Ludwig's own snapshot would write the quantised base to disk.
            return int(super().tune_batch_size(config, training_set, *args, **{**kwargs, "snapshot_weights": False}))

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Restore trained weights, optimiser, loss scale, random numbers and mode at the end."""
        parameters = trained_parameters(self.model)
        weights = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        optimizer, scaler = copy.deepcopy(self.optimizer.state_dict()), self.loss_scaler.state_dict()
        training = self.model.training
        cuda = torch.device(self.device).type == "cuda"
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
            try:
                yield
            finally:
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(weights[name])
                self.optimizer.zero_grad(set_to_none=True)
                self.optimizer.load_state_dict(optimizer)
                if scaler:
                    self.loss_scaler.load_state_dict(scaler)
                self.model.reset_metrics()
                self.model.train(training)

    def _create_batch_size_evaluator(self) -> BatchSizeSearch:
        return BatchSizeSearch(self, self._tuning_set, train=True)

    def _create_predict_batch_size_evaluator(self) -> BatchSizeSearch:
        return BatchSizeSearch(self, self._tuning_set, train=False)
