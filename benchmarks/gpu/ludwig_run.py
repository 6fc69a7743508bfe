"""What runs of Ludwig share, with this plugin and without: the config, and a callback that tells the recorder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ludwig.api import LudwigModel
from ludwig.callbacks import Callback

from benchmarks.gpu.job import Job
from benchmarks.gpu.measure import Recorder
from benchmarks.gpu.rows import TEMPLATE
from benchmarks.gpu.runs import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRADIENT_NORM,
    RANK,
    SEED,
    TARGETS,
    WARM_UP_FRACTION,
)

NOT_SAVED = ("skip_save_processed_input", "skip_save_model", "skip_save_progress")


class Clock(Callback):
    """Tells a recorder of each step of Ludwig's loop, and ends the loop when it has enough."""

    def __init__(self, recorder: Recorder, count_tokens: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.recorder = recorder
        self.count_tokens = count_tokens

    def on_trainer_train_setup(self, trainer: Any, save_path: str, is_coordinator: bool) -> None:
        """Watch the trainer's steps."""
        step = trainer.train_step

        def train_step(inputs: Any, targets: Any = None, **kwargs: Any) -> Any:
            tokens = self.count_tokens(inputs, targets)  # before the step: stock Ludwig's changes the targets in place
            outcome = step(inputs, targets, **kwargs)
            self.recorder.record(outcome[0], tokens)
            return outcome

        trainer.train_step = train_step
        self.recorder.begin()

    def on_batch_end(self, trainer: Any, progress_tracker: Any, save_path: str, sync_step: bool = True) -> None:
        """Note the step."""
        self.recorder.end_step()
        if self.recorder.finished:
            trainer.total_steps = progress_tracker.steps

    def on_trainer_train_teardown(
        self, trainer: Any, progress_tracker: Any, save_path: str, is_coordinator: bool
    ) -> None:
        """Stop watching."""
        self.recorder.end()
        # The plugin's steps return the latest loss that has reached the host, which is that of an earlier step.
        curve = getattr(trainer, "loss_curve", None)
        if curve is not None:
            self.recorder.losses = [loss for _, loss in curve]


def ludwig_config(job: Job) -> dict[str, Any]:
    """Return the config of `job` in Ludwig's own terms; what only the plugin knows is added by `run_ours`."""
    run = job.run
    return {
        "model_type": "llm",
        "base_model": job.base_model,
        "prompt": {"template": TEMPLATE},
        "input_features": [{"name": "prompt", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "preprocessing": {"split": {"type": "fixed"}, "global_max_sequence_length": run.length},
        "adapter": {"type": "lora", "r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": TARGETS},
        "trainer": {
            "type": "finetune",
            "train_steps": run.warm_up + run.steps,
            "batch_size": run.batch,
            "learning_rate": LEARNING_RATE,
            "learning_rate_scheduler": {"decay": "cosine", "warmup_fraction": WARM_UP_FRACTION},
            "gradient_clipping": {"clipglobalnorm": MAX_GRADIENT_NORM},
            "optimizer": {"type": "adamw"},
            "skip_all_evaluation": True,
        },
        "generation": {"do_sample": False, "max_new_tokens": 64},
        "backend": {"type": "local"},
    }


def train(job: Job, config: dict[str, Any], count_tokens: Callable[[Any, Any], Any]) -> tuple[LudwigModel, Recorder]:
    """Train as a user's script does, with logs; only the model and the processed rows are not written to the disk."""
    run = job.run
    recorder = Recorder(run.warm_up, run.steps, job.device, run.stop)
    model = LudwigModel(config, logging_level=logging.INFO, callbacks=[Clock(recorder, count_tokens)])
    model.train(
        dataset=str(job.rows), output_directory=str(job.output), random_seed=SEED, **dict.fromkeys(NOT_SAVED, True)
    )
    return model, recorder
