"""In steady state no training step waits for the GPU, and nothing is compiled again."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ludwig.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ludwig_peft_plugin.data.batcher import TokenBatcher
from ludwig_peft_plugin.data.prefetch import Prefetch
from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.training.loss_log import LossLog

pytestmark = pytest.mark.gpu

STEPS, FIRST, LAST = 30, 10, 25  # steps 10 to 25 must not wait
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


class Steady(Callback):
    """Makes every wait for the GPU in the steady steps an error, and counts compiled graphs around them."""

    def __init__(self) -> None:
        self.graphs: list[int] = []
        self.fused: bool | None = None

    def on_batch_start(self, trainer, progress_tracker, save_path):
        if progress_tracker.steps + 1 == FIRST:
            self.graphs.append(compiled_graphs())
            torch.cuda.set_sync_debug_mode("error")

    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):
        if progress_tracker.steps == LAST:
            torch.cuda.set_sync_debug_mode("default")
            self.graphs.append(compiled_graphs())
            self.fused = trainer.optimizer.param_groups[0].get("fused")


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def many_rows() -> pd.DataFrame:
    """Enough short rows for 30 packed steps in one epoch."""
    frame = pd.read_csv(ROOT / "datasets" / "stdlib_instructions.csv", keep_default_na=False)
    frame = frame[frame["output"].str.len() + frame["instruction"].str.len() < 900]
    frame = pd.concat([frame] * 3, ignore_index=True)
    return frame.assign(split=[0] * (len(frame) - 8) + [1] * 8)


@pytest.mark.parametrize("compiled", [False, True], ids=["fused", "compiled"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_or_compiles(
    make_config, new_model, many_rows, tmp_path, adapter, compiled, accumulation, monkeypatch
):
    """Fused layers in CUDA graphs, and transformers' layers compiled (fused ones leave nothing to compile)."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # what another case has compiled would serve this one
    counters.clear()
    monkeypatch.setenv("LUDWIG_PEFT_FUSED", "0" if compiled else "1")
    trainer = {
        "type": "finetune",
        "train_steps": STEPS,
        "learning_rate": 2e-3,
        "packing": True,
        "tokens_per_batch": 1024,
        "gradient_accumulation_steps": accumulation,
        "compile": compiled,
        "optimizer": {"type": "adamw"},
        "learning_rate_scheduler": {"decay": "cosine", "warmup_fraction": 0.1},
    }
    section = {"type": adapter, "r": 8, "dropout": 0.05, "target_modules": "all-linear"}
    steady = Steady()
    model = new_model(make_config(trainer=trainer, adapter=section))
    results = model.train(dataset=many_rows, output_directory=str(tmp_path), callbacks=[steady])
    before, after = steady.graphs
    assert after == before
    assert (before > 0) == compiled
    assert steady.fused is True
    (folder,) = Path(results.output_directory).glob("model/logs/training")
    logged = EventAccumulator(str(folder)).Reload().Scalars("combined/step_training_loss")
    assert [event.step for event in logged] == list(range(STEPS))
    losses = [event.value for event in logged]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_losses_arrive_late_but_whole():
    log = LossLog()
    log.add(1, torch.zeros((), device="cuda"))  # the first is waited for
    torch.cuda.set_sync_debug_mode("error")
    expected = [(1, 0.0)]
    for step in range(2, 40):
        torch.cuda._sleep(10_000_000)  # some milliseconds of work, so that the host runs ahead
        log.add(step, torch.full((), step / 8, device="cuda"))
        expected.append((step, step / 8))
    torch.cuda.set_sync_debug_mode("default")
    assert not math.isnan(float(log.newest))
    assert log.curve == expected


def test_batches_are_page_locked_and_equal():
    rows = Ragged.from_lists([list(range(3, 3 + length)) for length in (5, 9, 12, 7)])
    frame = pd.DataFrame({"prompt": ["p"] * 4, "output": ["o"] * 4})
    dataset = TokenDataset(rows, np.full(4, 2, np.int32), frame, has_targets=True)
    batcher = TokenBatcher(dataset, 2, shuffle=False)
    with Prefetch(batcher.make, range(2), "cuda") as batches:
        for step, batch in enumerate(batches):
            (part,), (expected,) = batch.micro_batches, batcher.make(step).micro_batches
            assert part.input_ids.is_pinned()
            assert part.target_positions.is_pinned()
            assert torch.equal(part.to("cuda").input_ids.cpu(), expected.input_ids)
