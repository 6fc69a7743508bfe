"""The loss of every step, brought from the device to the host without waiting for it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from ludwig.trainers.trainer import Trainer
from torch import Tensor

logger = logging.getLogger(__name__)

WRITE_EVERY = 10  # steps that are written to TensorBoard together
LAG = 4  # steps the host may be ahead of the device at most


@dataclass(frozen=True)
class StepSummary:
    """What Ludwig's loop logs of a step beside its loss: the arguments of its `write_step_summary`."""

    writer: Any
    features: tuple[str, ...]
    step: int
    used_tokens: int
    total_tokens: int
    learning_rate: float | None
    time: float = field(default_factory=time.time)

    def write(self, loss: float) -> None:
        """Write the tags of this step, without those of the device's memory."""
        tags: dict[str, float] = {
            "tokens/tokens": self.used_tokens,
            "tokens/total_tokens_used": self.total_tokens,
            "combined/step_training_loss": loss,
            **{f"{name}/step_training_loss": loss for name in self.features},
        }
        if self.learning_rate:
            tags["combined/step_learning_rate"] = self.learning_rate
        for tag, value in tags.items():
            self.writer.add_scalar(tag, value, global_step=self.step, walltime=self.time)

    def write_with_memory(self, loss: float) -> None:
        """Write the tags of this step as Ludwig does, which asks the driver about the device's memory, and flush."""
        value = torch.tensor(loss)
        Trainer.write_step_summary(
            self.writer,
            value,
            dict.fromkeys(self.features, value),
            self.step,
            self.used_tokens,
            self.total_tokens,
            self.learning_rate,
        )


@dataclass
class _Entry:
    step: int
    value: Tensor  # on the host, scalar; valid once `copied` has happened
    copied: torch.cuda.Event | None
    summary: StepSummary | None = None
    loss: float = math.nan


class LossLog:
    """Collects the loss of each optimiser step, and writes TensorBoard's step summaries when losses have arrived.

    On a GPU a loss is copied to page-locked memory behind the step's other work; the host looks from step to step
    what has arrived. It waits only where it would otherwise be more than `LAG` steps ahead, which leaves the device
    work to do. On a CPU every loss is there at once.
    """

    def __init__(self) -> None:
        self._arrived: list[tuple[int, float]] = []
        self._pending: deque[_Entry] = deque()
        self._unwritten: list[_Entry] = []  # arrived
        self._latest: _Entry | None = None
        self._slots: Tensor | None = None
        self._count = 0
        self._warned = False

    def restore(self, curve: list[tuple[int, float]]) -> None:
        """Begin with the losses of an interrupted run."""
        self._arrived = [(int(step), float(loss)) for step, loss in curve]

    def add(self, step: int, loss: Tensor) -> None:
        """Take the loss of step number `step` (from 1), a scalar on any device."""
        if len(self._unwritten) >= WRITE_EVERY:
            self.write()
        self._latest = self._copy(step, loss.detach())
        self._pending.append(self._latest)
        self._receive()

    def _copy(self, step: int, loss: Tensor) -> _Entry:
        if not loss.is_cuda:
            return _Entry(step, loss, None)
        if self._slots is None:
            self._slots = torch.empty(LAG + 1, dtype=torch.float32, pin_memory=True)
        slot = self._slots[self._count % len(self._slots)]
        self._count += 1
        slot.copy_(loss, non_blocking=True)
        # Without `blocking`, waiting for the event would keep a processor core busy.
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        return _Entry(step, slot, copied)

    def _receive(self, *, wait: bool = False) -> None:
        """Take over the losses that have arrived; with `wait`, all of them."""
        while self._pending:
            entry = self._pending[0]
            if entry.copied is not None and not entry.copied.query():
                # The very first loss is waited for, so that there is one to show.
                if not wait and len(self._pending) <= LAG and self._arrived:
                    return
                entry.copied.synchronize()
            self._pending.popleft()
            entry.loss = float(entry.value)
            self._arrived.append((entry.step, entry.loss))
            self._unwritten.append(entry)
            self._check(entry)

    def _check(self, entry: _Entry) -> None:
        if math.isfinite(entry.loss) or self._warned:
            return
        self._warned = True
        logger.warning(
            "Step %d: the training loss became %s. What the run learns from here on is lost; it ends at the next "
            "checkpoint if the weights are no numbers either. A lower trainer.learning_rate, a warm-up "
            "(learning_rate_scheduler.warmup_fraction) or gradient_clipping usually helps, and precision: bfloat16 "
            "where float16 overflows.",
            entry.step,
            entry.loss,
        )

    def summarize(self, summary: StepSummary) -> None:
        """Have `summary` written with the loss that was added last, once that has arrived."""
        if self._latest is not None:
            self._latest.summary = summary

    @property
    def newest(self) -> Tensor:
        """The latest loss that has arrived, as a scalar on the host."""
        return torch.tensor(self._arrived[-1][1] if self._arrived else math.nan)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, loss) of every step so far; waits for the device."""
        self._receive(wait=True)
        return list(self._arrived)

    def write(self) -> None:
        """Write the summaries of the losses that have arrived, in order."""
        entries = [entry for entry in self._unwritten if entry.summary is not None]
        # The summary of the step under way is still to come.
        self._unwritten = [e for e in self._unwritten if e is self._latest and e.summary is None]
        for entry in entries:
            assert entry.summary is not None
            if entry is entries[-1]:
                entry.summary.write_with_memory(entry.loss)
            else:
                entry.summary.write(entry.loss)

    def flush(self) -> None:
        """Wait for every loss, and write every summary."""
        self._receive(wait=True)
        self.write()
