"""Where a training step's time goes: stages that follow one another, timed on the host and on the device's stream."""

from __future__ import annotations

import time
from typing import Any

import torch
from ludwig.callbacks import Callback

from ludwig_peft_plugin.training import loss

DATA, FORWARD, LOSS, BACKWARD, OPTIMISER, LOGGING = "data", "forward", "loss", "backward", "optimiser", "logging"
STAGES = (DATA, FORWARD, LOSS, BACKWARD, OPTIMISER, LOGGING)


class Stages:
    """Splits the time between `start` and `stop` into stages; `enter` ends one and begins the next.

    Each change records a CUDA event, which the host does not wait for, and opens a range of the profiler. A stage's
    device time is what passes on the stream between its events, waiting for the host included.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.running = False
        self._marks: list[tuple[str | None, float, Any]] = []
        self._range: Any = None

    def start(self) -> None:
        """Begin to time, in the first stage."""
        self.running = True
        self.enter(DATA)

    def stop(self) -> None:
        """End the last stage."""
        self._mark(None)
        self.running = False

    def enter(self, stage: str) -> None:
        """End the running stage and begin `stage`."""
        if self.running:
            self._mark(stage)

    def _mark(self, stage: str | None) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((stage, time.perf_counter(), event))
        self._range = torch.profiler.record_function(f"stage: {stage}") if stage is not None else None
        if self._range is not None:
            self._range.__enter__()

    def milliseconds(self, steps: int) -> dict[str, dict[str, float]]:
        """Return `host_ms` and `device_ms` a step, by stage. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        table: dict[str, dict[str, float]] = {}
        for (stage, begun, first), (_, ended, last) in zip(self._marks, self._marks[1:], strict=False):
            if stage is None:
                continue
            row = table.setdefault(stage, {"host_ms": 0.0, "device_ms": 0.0})
            row["host_ms"] += 1000 * (ended - begun) / steps
            row["device_ms"] += (first.elapsed_time(last) if self.cuda else 1000 * (ended - begun)) / steps
        return {stage: table[stage] for stage in STAGES if stage in table}


class StageClock(Callback):
    """Marks the stages of the plugin's trainer: `timed` steps by themselves, then `profiled` ones under the profiler.

    The profiler makes the host slower, so the stage table is taken without it. The fused loss makes its gradient in
    the forward pass: that is part of `loss`.
    """

    def __init__(self, warm_up: int, timed: int, profiled: int, cuda: bool) -> None:
        super().__init__()
        self.stages = Stages(cuda)
        self.profiled_stages = Stages(cuda)
        self.cuda, self.warm_up, self.timed, self.profiled = cuda, warm_up, timed, profiled
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self.steps = 0
        self.seconds = 0.0
        self._started = 0.0

    def _enter(self, stage: str) -> None:
        self.stages.enter(stage)
        self.profiled_stages.enter(stage)

    def on_trainer_train_setup(self, trainer: Any, save_path: str, is_coordinator: bool) -> None:
        """Mark the boundaries of the stages inside the trainer's step."""
        step, optimiser, backward = trainer.train_step, trainer._step_optimizer, torch.Tensor.backward

        def train_step(*args: Any, **kwargs: Any) -> Any:
            self._enter(FORWARD)
            outcome = step(*args, **kwargs)
            self._enter(LOGGING)
            return outcome

        def step_optimizer(*args: Any, **kwargs: Any) -> Any:
            self._enter(OPTIMISER)
            return optimiser(*args, **kwargs)

        def tensor_backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._enter(BACKWARD)
            outcome = backward(tensor, *args, **kwargs)
            self._enter(FORWARD)  # of the next micro-batch, if there is one
            return outcome

        trainer.train_step, trainer._step_optimizer = train_step, step_optimizer
        torch.Tensor.backward = tensor_backward  # type: ignore[method-assign]
        self._backward = backward
        states = loss.target_states

        def target_states(*args: Any, **kwargs: Any) -> Any:
            outcome = states(*args, **kwargs)
            self._enter(LOSS)
            return outcome

        loss.target_states = target_states
        self._states = states

    def on_batch_start(self, trainer: Any, progress_tracker: Any, save_path: str) -> None:
        """Begin the data stage of a step."""
        self._enter(DATA)

    def on_batch_end(self, trainer: Any, progress_tracker: Any, save_path: str, sync_step: bool = True) -> None:
        """Start and stop the two windows between steps."""
        self.steps += 1
        if self.steps == self.warm_up:
            self._synchronize()
            self._started = time.perf_counter()
            self.stages.start()
        elif self.steps == self.warm_up + self.timed:
            self.stages.stop()
            self._synchronize()
            self.seconds = time.perf_counter() - self._started
            self.profiler.start()
            self.profiled_stages.start()
        elif self.steps == self.warm_up + self.timed + self.profiled:
            self.profiled_stages.stop()
            self._synchronize()
            self.profiler.stop()

    def on_trainer_train_teardown(
        self, trainer: Any, progress_tracker: Any, save_path: str, is_coordinator: bool
    ) -> None:
        """Put back what was replaced for the whole process."""
        torch.Tensor.backward = self._backward  # type: ignore[method-assign]
        loss.target_states = self._states

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
