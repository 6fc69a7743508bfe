"""Ends a run at a step or an epoch as a crash would: nothing of Ludwig's runs afterwards."""

from __future__ import annotations

from typing import Any

from ludwig.callbacks import Callback


class Killed(Exception):
    """What ends the run."""


class KillAt(Callback):
    """Raises `Killed` after a number of steps or of epochs; with neither the run goes to its end."""

    def __init__(self, step: int | None = None, *, epoch: int | None = None) -> None:
        self._step, self._epoch = step, epoch

    def on_batch_end(self, trainer: Any, progress_tracker: Any, save_path: str, **kwargs: Any) -> None:
        if progress_tracker.steps == self._step:
            raise Killed

    def on_epoch_end(self, trainer: Any, progress_tracker: Any, save_path: str) -> None:
        if progress_tracker.epoch == self._epoch:
            raise Killed
