"""Training N steps equals training k, being killed, resuming, and training N - k: weights, losses and metrics."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import KillAt, Killed
from safetensors.torch import load_file

from ludwig_peft_plugin.errors import CheckpointError

TRAINER = {
    "type": "finetune",
    "epochs": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "learning_rate_scheduler": {"decay": "linear", "warmup_fraction": 0.2},
    "steps_per_checkpoint": 4,  # an epoch has 6 steps, so checkpoints lie in the middle of epochs
}


def adapter(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model_weights" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(trainer=TRAINER)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config, new_model, rows):
    folder = str(tmp_path_factory.mktemp("whole"))
    results = new_model(config).train(dataset=rows, output_directory=folder)
    return results


@pytest.mark.parametrize("killed_after", [5, 11], ids=["first epoch", "second epoch"])
def test_resume_equals_uninterrupted(killed_after, tmp_path, config, new_model, rows, uninterrupted):
    with pytest.raises(Killed):
        new_model(config).train(dataset=rows, output_directory=str(tmp_path), callbacks=[KillAt(killed_after)])
    (run,) = tmp_path.iterdir()
    results = new_model(config).train(dataset=rows, model_resume_path=str(run))

    expected = adapter(uninterrupted.output_directory)
    resumed = adapter(str(run))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)
    ours, theirs = results.train_stats, uninterrupted.train_stats
    assert ours.validation["output"] == theirs.validation["output"]
    assert ours.training["output"] == theirs.training["output"]
    progress = json.loads((run / "model" / "training_progress.json").read_text())
    assert progress["steps"] == 12


def test_another_config_cannot_resume_and_nothing_is_lost(tmp_path, make_config, config, new_model, rows):
    with pytest.raises(Killed):
        new_model(config).train(dataset=rows, output_directory=str(tmp_path), callbacks=[KillAt(5)])
    (run,) = tmp_path.iterdir()
    checkpoint = run / "model" / "training_checkpoints" / "latest.ckpt"
    before = checkpoint.read_bytes()
    other = make_config(trainer=TRAINER, adapter={"type": "lora", "r": 2, "target_modules": "all-linear"})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        new_model(other).train(dataset=rows, model_resume_path=str(run))
    assert checkpoint.read_bytes() == before


@pytest.mark.slow
def test_resume_after_kill_9(tmp_path, config, new_model, rows, uninterrupted):
    """The real thing: another process, killed without a chance to clean up."""
    rows.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dataset": "rows.csv"}))
    script = (
        "import json, os, signal\n"
        "from ludwig_peft_plugin.register import register; register()\n"
        "from ludwig.api import LudwigModel\n"
        "from ludwig.callbacks import Callback\n"
        "class Kill(Callback):\n"
        "    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):\n"
        "        if progress_tracker.steps == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LudwigModel(json.load(open('config.json')), callbacks=[Kill()]).train(output_directory='out')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:].decode()
    (run,) = (tmp_path / "out").iterdir()
    new_model(config).train(dataset=rows, model_resume_path=str(run))
    expected, resumed = adapter(uninterrupted.output_directory), adapter(str(run))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
