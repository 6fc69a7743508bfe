"""Ludwig's trainer of `model_type: ecd`, with what adapters of encoders do between optimiser steps."""

from __future__ import annotations

import os
from typing import Any

import torch
from ludwig.trainers.trainer import Trainer
from ludwig.utils.checkpoint_utils import get_latest_checkpoint_path
from ludwig.utils.trainer_utils import get_final_steps_per_checkpoint

from ludwig_peft_plugin.encoders.step_hooks import EncoderSteps, optimizer_steps
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.training.first_error import first_error_shown

STATE = "ludwig_peft_plugin.encoder_adapters"
"""The entry of the optimiser's saved state that holds that of the hooks: one file, so both are of the same step."""


class EcdTrainer(Trainer):
    """Trains as Ludwig does where no adapter asks for more."""

    _steps: EncoderSteps | None = None  # while a run goes on that needs them
    _saved: dict[str, Any] | None = None  # of the checkpoint that a run is resumed from

    def prepare(self) -> None:
        """Create the optimiser, whose saved state takes that of the adapters along."""
        super().prepare()
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            return
        self.optimizer.register_state_dict_post_hook(self._add_state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and return what Ludwig's trainer does: the model and the metrics of the splits."""
        self._steps = None
        try:
            with first_error_shown():
                return super().train(*args, **kwargs)
        finally:
            self._steps = self._saved = None

    def resume_weights_and_optimizer(self, model_weights_progress_path: str, checkpoint: Any) -> None:
        """Load the last checkpoint, and keep what it holds for the adapters until the run's length is known."""
        super().resume_weights_and_optimizer(model_weights_progress_path, checkpoint)
        path = get_latest_checkpoint_path(model_weights_progress_path)
        if path is not None and os.path.exists(path):
            # Read again, because the optimisers of bitsandbytes run no hooks when they load.
            state = torch.load(path, map_location=self.device, weights_only=True)
            self._saved = state.get("optim_state", {}).get(STATE)

    def _train_loop(self, batcher: Any, progress_tracker: Any, *args: Any, **kwargs: Any) -> Any:
        if self._steps is None:
            self._steps = self._new_steps()
            if self._steps is not None and progress_tracker.steps:
                self._steps.restore(self._saved)
        return super()._train_loop(batcher, progress_tracker, *args, **kwargs)

    def _new_steps(self) -> EncoderSteps | None:
        """Return the hooks of the encoders' adapters for this run, None where there are none."""
        per_checkpoint = get_final_steps_per_checkpoint(
            self.steps_per_epoch, self.steps_per_checkpoint, self.checkpoints_per_epoch
        )
        total = optimizer_steps(
            self.total_steps,
            self.steps_per_epoch,
            self.gradient_accumulation_steps,
            min(per_checkpoint, self.total_steps),
        )
        steps = EncoderSteps(self.model, total)
        if steps.hooks and isinstance(self.optimizer, torch.optim.LBFGS):
            names = ", ".join(steps.hooks)
            raise AdapterError(
                f"trainer.optimizer: lbfgs runs the model several times a step, which the adapter of {names} cannot "
                "follow; use another optimiser, such as adamw."
            )
        return steps if steps.hooks else None

    def _optimizer_step(self, variables: Any) -> None:
        if self._steps is None:
            super()._optimizer_step(variables)
            return
        if (term := self._steps.loss_term()) is not None:
            (self.scaler.scale(term) if self.scaler else term).backward()
        scale = self.scaler.get_scale() if self.scaler else 0.0
        super()._optimizer_step(variables)
        # The scale falls when gradients were infinite: then no step was taken, and they say nothing.
        if not self.scaler or self.scaler.get_scale() >= scale:
            self._steps.after_step()

    def _add_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put the hooks' state into the optimiser's, in place."""
        if self._steps is not None:
            state[STATE] = self._steps.state()
