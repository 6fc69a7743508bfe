"""Every step's own loss reaches the curve and TensorBoard in order, also where losses arrive late."""

import logging
import math
from collections import deque

import pytest
import torch
from ludwig.trainers.trainer import Trainer

from ludwig_peft_plugin.training import loss_log
from ludwig_peft_plugin.training.loss_log import LAG, WRITE_EVERY, LossLog, StepSummary


class Writer:
    """What a SummaryWriter is told: (tag, step) -> value, in order."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}
        self.flushes = 0

    def add_scalar(self, tag, value, global_step=None, walltime=None):
        assert (tag, global_step) not in self.values
        self.values[tag, global_step] = float(value)

    def flush(self):
        self.flushes += 1

    def losses(self) -> list[tuple[int, float]]:
        return [(step, value) for (tag, step), value in self.values.items() if tag == "combined/step_training_loss"]


def summary(writer: Writer, step: int, rate: float | None = 0.1) -> StepSummary:
    return StepSummary(writer, ("output",), step, 100, 100 * (step + 1), rate)


def run(log: LossLog, writer: Writer, losses: list[float]) -> list[float]:
    """What the progress bar shows after each step."""
    shown = []
    for step, loss in enumerate(losses):
        log.add(step + 1, torch.tensor(loss))
        shown.append(float(log.newest))
        log.summarize(summary(writer, step))
    return shown


LOSSES = [3.0 - 0.125 * step for step in range(WRITE_EVERY * 2 + 3)]


class LateLog(LossLog):
    """Losses arrive as from a GPU that is `behind` steps behind, through slots that are used again."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.behind = behind
        self.queued: deque[Copy] = deque()
        self.slots = torch.full((LAG + 1,), math.nan)
        self.waits = 0

    def _copy(self, step, loss):
        slot = self.slots[step % len(self.slots)]
        copy = Copy(self, slot, float(loss))
        self.queued.append(copy)
        if len(self.queued) > self.behind:
            self.queued.popleft().happen()
        return loss_log._Entry(step, slot, copy)


class Copy:
    """Stands for the event behind a copy."""

    def __init__(self, log: LateLog, slot: torch.Tensor, value: float) -> None:
        self.log, self.slot, self.value, self.done = log, slot, value, False

    def happen(self) -> None:
        self.slot.fill_(self.value)
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.log.waits += 1
        while not self.done:
            self.log.queued.popleft().happen()


def test_on_a_cpu_every_loss_is_there_at_once():
    log = LossLog()
    assert run(log, Writer(), LOSSES) == LOSSES
    assert log.curve == [(step + 1, loss) for step, loss in enumerate(LOSSES)]


@pytest.mark.parametrize("behind", [1, 2, LAG])
def test_late_losses_are_waited_for_only_once(behind):
    log, writer = LateLog(behind), Writer()
    shown = run(log, writer, LOSSES)
    assert log.waits == 1  # the first, so that there is one to show
    assert shown[0] == LOSSES[0]
    assert shown[behind + 1 :] == LOSSES[1:-behind]
    log.flush()
    assert writer.losses() == list(enumerate(LOSSES))
    assert log.curve == [(step + 1, loss) for step, loss in enumerate(LOSSES)]


def test_the_host_does_not_run_away_from_the_device():
    log = LateLog(behind=1000)
    for step in range(50):
        log.add(step + 1, torch.tensor(float(step)))
        assert len(log._pending) <= LAG
    assert log.curve == [(step + 1, float(step)) for step in range(50)]


def test_steps_are_written_together_and_the_rest_at_the_end():
    log, writer = LossLog(), Writer()
    counts = []
    for step, loss in enumerate(LOSSES):
        log.add(step + 1, torch.tensor(loss))
        log.summarize(summary(writer, step))
        counts.append(len(writer.losses()))
    assert set(counts) == {0, WRITE_EVERY, 2 * WRITE_EVERY}
    assert writer.flushes == 2
    log.flush()
    assert writer.losses() == list(enumerate(LOSSES))
    log.flush()
    assert writer.flushes == 3


@pytest.mark.parametrize("rate", [None, 0.1])
def test_the_tags_are_ludwigs(rate):
    expected, log, writer = Writer(), LossLog(), Writer()
    for step in range(2):
        value = torch.tensor(1.5 + step)
        Trainer.write_step_summary(expected, value, {"output": value}, step, 100, 100 * (step + 1), rate)
        log.add(step + 1, value)
        log.summarize(summary(writer, step, rate))
    log.flush()
    if torch.cuda.is_available():  # the memory of the device is only asked for at the newest step of several
        expected.values = {key: value for key, value in expected.values.items() if not key[0].startswith("cuda/")}
        writer.values = {key: value for key, value in writer.values.items() if not key[0].startswith("cuda/")}
    assert list(writer.values.items()) == list(expected.values.items())


def test_without_tensorboard_nothing_is_kept_for_it():
    log = LossLog()
    for step in range(1000):
        log.add(step + 1, torch.tensor(1.0))
    assert len(log._unwritten) <= WRITE_EVERY + 1
    assert len(log.curve) == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_reported_once(caplog, value):
    log = LateLog(behind=2)
    with caplog.at_level(logging.WARNING, logger="ludwig_peft_plugin"):
        run(log, Writer(), [2.0, 1.0, value, value, value, 3.0, 3.0])
    (message,) = caplog.messages
    assert message.startswith(f"Step 3: the training loss became {value}")
    assert "learning_rate" in message


def test_goes_on_with_the_curve_of_an_interrupted_run():
    log = LossLog()
    log.restore([[1, 3.0], [2, 2.5]])
    log.add(3, torch.tensor(2.0))
    assert log.curve == [(1, 3.0), (2, 2.5), (3, 2.0)]
