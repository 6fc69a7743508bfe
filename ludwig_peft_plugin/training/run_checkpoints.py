"""What a run keeps at each checkpoint, and how an interrupted one goes on from the last."""

from __future__ import annotations

import logging
import os
from typing import Any

from ludwig.globals import TRAINING_PROGRESS_TRACKER_FILE_NAME
from ludwig.trainers.trainer import Trainer
from torch import Tensor

from ludwig_peft_plugin.adapters.step_hooks import StepHooks
from ludwig_peft_plugin.training.checkpoint import TrainingCheckpoint, write_json
from ludwig_peft_plugin.training.loss_log import LossLog
from ludwig_peft_plugin.training.step_rows import StepRows

logger = logging.getLogger(__name__)


class RunCheckpoints(Trainer):
    """The part of the trainer that saves where a run is, and finds it again.

    What the loop takes up where it was (`_saved_...`) is left for it to apply once it has made anew what it applies to.
    """

    resume: bool
    batch_size: int
    _losses: LossLog
    _rows: StepRows | None
    _hooks: StepHooks | None
    _saved_scheduler: dict[str, Any] | None
    _saved_rates: list[float]
    _saved_hooks: tuple[dict[str, Tensor], dict[str, Any]] | None

    def create_checkpoint_handle(self) -> TrainingCheckpoint:
        """Return the checkpoint of this run: trained weights, optimiser, schedule and position."""
        self._checkpoint = TrainingCheckpoint(self.distributed, self.model, self.optimizer, self.scheduler)
        return self._checkpoint

    def save_checkpoint(self, progress_tracker: Any, save_path: str, checkpoint_manager: Any) -> None:
        """Save weights, optimiser and progress in one file, so that they can never be of different steps."""
        progress_tracker.increment_checkpoint()
        self._checkpoint.scheduler = self.scheduler
        self._checkpoint.hooks = None if self._hooks is None else self._hooks.state()
        self._checkpoint.extra = {
            "progress": _progress(progress_tracker),
            "steps_into_epoch": self._rows.steps_into_epoch if self._rows else 0,
            "capacity": self._rows.capacity if self._rows else None,
            "loss_curve": self.loss_curve,
        }
        checkpoint_manager.save(progress_tracker.steps)
        write_json(os.path.join(save_path, TRAINING_PROGRESS_TRACKER_FILE_NAME), self._checkpoint.extra["progress"])
        self.callback(lambda c: c.on_checkpoint(self, progress_tracker))

    def _create_or_resume_progress_tracker(
        self, progress_path: str, checkpoints_path: str, checkpoint: Any, output_features: Any
    ) -> Any:
        """Resume after the last checkpoint. One that cannot be used is an error, never a new start."""
        if not (self.resume and self.resume_files_exist(progress_path, checkpoints_path)):
            resume, self.resume = self.resume, False
            try:
                return super()._create_or_resume_progress_tracker(
                    progress_path, checkpoints_path, checkpoint, output_features
                )
            finally:
                self.resume = resume
        from ludwig.utils.trainer_utils import ProgressTracker

        self.resume_weights_and_optimizer(checkpoints_path, checkpoint)
        tracker = ProgressTracker.load(checkpoint.extra["progress"])
        self._losses.restore(checkpoint.extra["loss_curve"])
        self._saved_scheduler = checkpoint.scheduler_state
        self._saved_hooks = checkpoint.hooks
        self._saved_rates = [group["lr"] for group in self.optimizer.param_groups]
        if self._rows is not None:
            self._rows.skip_steps = int(checkpoint.extra["steps_into_epoch"])
            if self.tuned:  # measuring again may find another size, and the run's order goes by the first
                self.batch_size = tracker.batch_size
                self._rows.capacity = checkpoint.extra["capacity"]
        logger.info("Resuming after step %d (epoch %d).", tracker.steps, tracker.epoch)
        return tracker


def _progress(tracker: Any) -> dict[str, Any]:
    """Return the progress tracker's lasting fields, as Ludwig's own file holds them."""
    passing = {"steps_per_epoch", "total_steps", "training_start_time"}
    return {name: value for name, value in vars(tracker).items() if name not in passing}
