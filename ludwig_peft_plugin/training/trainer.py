"""The fine-tuning trainer: Ludwig's loop around our optimiser step, evaluation and checkpoints."""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from typing import Any

import torch
from ludwig.globals import TRAINING_CHECKPOINTS_DIR_PATH
from ludwig.trainers.trainer_llm import FineTuneTrainer
from ludwig.utils.trainer_utils import append_metrics
from torch.amp.grad_scaler import GradScaler
from torch.profiler import record_function

from ludwig_peft_plugin.adapters.step_hooks import StepHooks
from ludwig_peft_plugin.data.batches import StepBatch
from ludwig_peft_plugin.evaluation import in_training
from ludwig_peft_plugin.evaluation.predictor import PeftPredictor
from ludwig_peft_plugin.training.adapter_start import AdapterStart
from ludwig_peft_plugin.training.batch_size import BatchSizeTuning
from ludwig_peft_plugin.training.checkpoint import trained_parameters
from ludwig_peft_plugin.training.first_error import first_error_shown
from ludwig_peft_plugin.training.loss_log import LossLog, StepSummary
from ludwig_peft_plugin.training.out_of_memory import explained_out_of_memory
from ludwig_peft_plugin.training.run_checkpoints import RunCheckpoints
from ludwig_peft_plugin.training.step_rows import SeededBatches, StepRows

logger = logging.getLogger(__name__)

INITIAL_ADAPTER = "initial_adapter"  # beside the checkpoints


class PeftTrainer(AdapterStart, BatchSizeTuning, RunCheckpoints, FineTuneTrainer):
    """Fine-tunes a `PeftLLM`.

    One batch of the loop is one optimiser step: its micro-batches are accumulated inside `train_step`, weighted by
    their target tokens. So steps, schedule, logs and checkpoints all count optimiser steps.

    No step waits for the GPU: losses are logged when they have arrived, up to a few steps later (see `LossLog`).
    """

    batch_size: int
    gradient_accumulation_steps: int
    resume: bool

    def __init__(self, config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        self._compile = bool(config.compile)
        config.compile = False  # Ludwig would compile the wrapper around the model, which is not what runs
        try:
            super().__init__(config, model, *args, **kwargs)
        finally:
            config.compile = self._compile
        self.autocast = self._autocast_dtype()
        half = model.config_obj.precision == "float16"
        # float16 gradients of activations underflow without a scale; bfloat16 has float32's range.
        self.loss_scaler = GradScaler(torch.device(self.device).type, enabled=half)
        self._losses = LossLog()
        self._progress: Any = None
        self._folder: str | None = None
        self._rows: StepRows | None = None
        self._saved_scheduler: dict[str, Any] | None = None
        self._saved_rates: list[float] = []
        self._hooks: StepHooks | None = None  # of the adapter, over all epochs of a run
        self._saved_hooks: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None

    def _autocast_dtype(self) -> torch.dtype | None:
        """Mixed precision is for weights kept in float32 on a GPU; lower precisions compute in their own dtype."""
        chosen = getattr(self.model.config_obj.adapter, "computes_in_bfloat16", None)
        if chosen is not None and chosen(torch.device(self.device), self.model.config_obj.precision):
            self.use_amp, self.scaler = False, None
            return torch.bfloat16
        if not self.config.use_mixed_precision:
            return None
        self.use_amp, self.scaler = False, None
        if torch.device(self.device).type != "cuda" or self.model.model.dtype != torch.float32:
            logger.info("trainer.use_mixed_precision adds nothing: the model runs in %s.", self.model.model.dtype)
            return None
        return torch.bfloat16

    # ---- one optimiser step -----------------------------------------------------------------------------------

    def _batch_to_tensors(self, batch: StepBatch) -> tuple[StepBatch, dict[str, Any]]:
        return batch, {}

    def train_step(
        self, inputs: StepBatch, targets: Any = None, should_step: bool = True, profiler: Any = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        """Run one optimiser step over the micro-batches of `inputs`.

        Returns:
            The latest loss that has arrived from the device, in nats per target token (scalar, on the host; on a CPU
            that of this very step), the same by output feature, and the tokens read.
        """
        total = max(inputs.target_tokens, 1)
        loss_sum = torch.zeros((), device=self.device)
        for part in inputs.micro_batches:
            with record_function("data"):
                micro_batch = self._micro_batch = part.to(self.device)
            precision = torch.autocast(loss_sum.device.type, self.autocast) if self.autocast else nullcontext()
            with record_function("forward"), precision:
                result = self.model(micro_batch)
            with record_function("backward"):
                self.loss_scaler.scale(result.loss_sum / total).backward()
            loss_sum += result.loss_sum.detach()
            if not self.evaluate_training_set:
                self.model.metrics.update(result)
        if self._hooks is not None and (term := self._hooks.loss_term()) is not None:
            self.loss_scaler.scale(term).backward()
        with record_function("optimizer"):
            self._step_optimizer()
        if profiler:
            profiler.step()
        if self._progress is None:  # not a step of the loop
            loss = loss_sum / total
        else:
            with record_function("logging"):
                self._losses.add(self._progress.steps + 1, loss_sum / total)
                loss = self._losses.newest
        return loss, dict.fromkeys(self.model.output_features, loss), inputs.tokens

    def _step_optimizer(self) -> None:
        self.loss_scaler.unscale_(self.optimizer)
        self.clip_grads(list(trained_parameters(self.model).values()))
        scale = self.loss_scaler.get_scale() if self._hooks is not None else 1.0
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        if self._hooks is not None:
            if self.loss_scaler.get_scale() < scale:  # no step was taken, because these gradients are infinite
                torch._foreach_zero_([p.grad for p in trained_parameters(self.model).values() if p.grad is not None])
            self._hooks.after_step(self._progress.steps + 1)
        self.optimizer.zero_grad(set_to_none=True)

    def write_step_summary(
        self,
        train_summary_writer: Any,
        combined_loss: torch.Tensor,
        all_losses: dict[str, torch.Tensor],
        step: int,
        used_tokens: int,
        total_tokens_used: int,
        learning_rate: float | None = None,
    ) -> None:
        """Have this step written to TensorBoard with its own loss, once that has arrived."""
        if train_summary_writer:
            summary = (train_summary_writer, tuple(all_losses), step, used_tokens, total_tokens_used, learning_rate)
            with record_function("logging"):
                self._losses.summarize(StepSummary(*summary))

    def train_online(self, dataset: Any) -> Any:
        """Train one pass over `dataset`, without evaluation or checkpoints."""
        self._attach_adapter_from_data(dataset)
        self.model.train()
        rows = StepRows(dataset, self)
        with rows.initialize_batcher(self.batch_size, self.should_shuffle, self.random_seed) as batcher:
            batcher.set_epoch(0, self.batch_size)
            while not batcher.last_batch():
                self.train_step(batcher.next_batch())
        return self.model

    # ---- the loop ---------------------------------------------------------------------------------------------

    def train(
        self,
        training_set: Any,
        validation_set: Any = None,
        test_set: Any = None,
        save_path: str = "model",
        **kwargs: Any,
    ) -> Any:
        """Train, then write the configured exports beside the model folder.

        Returns:
            What Ludwig's trainer returns: the model and the train, validation and test metrics.
        """
        started = time.monotonic()
        self._folder = save_path
        initial_adapter = os.path.join(save_path, TRAINING_CHECKPOINTS_DIR_PATH, INITIAL_ADAPTER)
        self._start_from_initial_adapter(initial_adapter)
        self._attach_adapter_from_data(training_set)
        self._keep_initial_adapter(initial_adapter)
        self._rows = StepRows(training_set, self)
        # Ludwig's loop must see every batch as a full step.
        accumulation, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        try:
            with first_error_shown():
                results = super().train(self._rows, validation_set, test_set, save_path, **kwargs)
        finally:
            self.gradient_accumulation_steps = accumulation
            self._rows = self._hooks = None
        if not self.skip_save_model and self.model.config_obj.export:
            splits = {"training": training_set, "validation": validation_set, "test": test_set}
            self._export(save_path, results, time.monotonic() - started, splits)
        return results

    def _export(self, save_path: str, results: Any, seconds: float, splits: dict[str, Any]) -> None:
        from ludwig_peft_plugin.export.run import export_all
        from ludwig_peft_plugin.export.summary import summarize

        trainable, total = self.model.parameter_counts()
        rows = {name: len(dataset) for name, dataset in splits.items() if dataset is not None}
        summary = summarize(results[1:], self.loss_curve, seconds, trainable, total, rows)
        prompts = splits["training"].frame[next(iter(self.model.input_features))].head(4).tolist()
        export_all(self.model, os.path.dirname(os.path.abspath(save_path)), summary, prompts)

    def _train_loop(self, batcher: Any, progress_tracker: Any, *args: Any, **kwargs: Any) -> Any:
        if self._saved_scheduler is not None:
            # Ludwig makes a new schedule after it has loaded the checkpoint; this one continues.
            self.scheduler.load_state_dict(self._saved_scheduler)
            for group, rate in zip(self.optimizer.param_groups, self._saved_rates, strict=True):
                group["lr"] = rate
            self._saved_scheduler = None
        self._progress = progress_tracker
        if self._hooks is None:
            self._hooks = self._step_hooks(progress_tracker.total_steps)
        batches = SeededBatches(batcher, self)
        try:
            with explained_out_of_memory(self.model.config_obj, "training", lambda: self._micro_batch):
                results = super()._train_loop(batches, progress_tracker, *args, **kwargs)
            self._losses.flush()
            return results
        finally:
            batches.close()
            self._losses.write()
            self._progress = None

    def _step_hooks(self, total_steps: int) -> StepHooks | None:
        """Return what the adapter does in each step of this run, where it was interrupted if it is resumed."""
        adapter = self.model.config_obj.adapter
        make = getattr(adapter, "step_hooks", None)
        hooks: StepHooks | None = None if make is None else make(self.model.model, total_steps)
        if hooks is not None and self._saved_hooks is not None:
            hooks.restore(*self._saved_hooks)
        self._saved_hooks = None
        return hooks

    def _eval_and_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[bool, bool]:
        self._losses.flush()
        return super()._eval_and_checkpoint(*args, **kwargs)

    @property
    def loss_curve(self) -> list[tuple[int, float]]:
        """(step, loss in nats per target token) of every optimiser step so far, counted from 1."""
        return self._losses.curve

    def _has_nan_or_inf_weights(self, model: Any) -> bool:
        """Look at what is trained: frozen weights cannot change."""
        parameters = trained_parameters(self.model)
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters.values()]).tolist()
        bad = [name for name, good in zip(parameters, finite, strict=True) if not good]
        if bad:
            logger.warning("NaN or infinite values in %d trained parameters (first: %s); stopping.", len(bad), bad[0])
        return bool(bad)

    def evaluation(
        self, dataset: Any, dataset_name: str, metrics_log: Any, batch_size: int, progress_tracker: Any
    ) -> Any:
        """Evaluate the loss and accuracies on `dataset`, and answers as `evaluation` in the config says."""
        dataset = dataset.dataset if isinstance(dataset, StepRows) else dataset
        predictor = PeftPredictor(self.model, batch_size=batch_size, report_tqdm_to_ray=self.report_tqdm_to_ray)
        with explained_out_of_memory(self.model.config_obj, "evaluating"):
            metrics = in_training.evaluate(predictor, dataset, dataset_name, progress_tracker, self._folder)
        return append_metrics(self.model, dataset_name, metrics, metrics_log, progress_tracker)
