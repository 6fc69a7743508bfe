"""AdaLoRA in the trainer: ranks fall over the run, and a resumed run is the uninterrupted one."""

from pathlib import Path

import pytest
import torch
from killed_runs import KillAt, Killed
from safetensors.torch import load_file

ADAPTER = {"type": "adalora", "init_r": 6, "target_r": 2, "dropout": 0.1, "delta_t": 2}
TRAINER = {"type": "finetune", "epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "steps_per_checkpoint": 4}


def adapter(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model_weights" / "adapter_model.safetensors")


def test_adalora_trains_resumes_and_ends_at_its_target(tmp_path, make_config, new_model, rows):
    config = make_config(adapter=ADAPTER, trainer=TRAINER)
    whole = new_model(config).train(dataset=rows, output_directory=str(tmp_path / "whole"))
    losses = whole.train_stats.validation["output"]["loss"]
    assert losses[-1] < losses[0]
    expected = adapter(whole.output_directory)

    with pytest.raises(Killed):
        new_model(config).train(dataset=rows, output_directory=str(tmp_path / "cut"), callbacks=[KillAt(9)])
    (run,) = (tmp_path / "cut").iterdir()
    new_model(config).train(dataset=rows, model_resume_path=str(run))
    resumed = adapter(str(run))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_what_adalora_has_learned_of_its_ranks_outlasts_an_epoch(tmp_path, make_config, new_model, rows):
    """The last epoch begins where ranks are settled, and only keeps what was switched off."""
    trainer = {**TRAINER, "epochs": 3, "steps_per_checkpoint": 0, "checkpoints_per_epoch": 1}
    results = new_model(make_config(adapter=ADAPTER, trainer=trainer)).train(
        dataset=rows, output_directory=str(tmp_path)
    )
    values = [tensor for name, tensor in adapter(results.output_directory).items() if "lora_E" in name]
    kept = sum(int((tensor != 0).sum()) for tensor in values)
    assert kept == ADAPTER["target_r"] * len(values)


def test_quantised_base_trains_and_exports(tmp_path, make_config, new_model, rows):
    config = make_config(
        adapter={"type": "loha", "r": 4},
        quantization={"bits": 4},
        export=["adapter", "merged"],  # each is loaded again and compared with the trained model
        trainer={**TRAINER, "epochs": 1},
    )
    results = new_model(config).train(dataset=rows, output_directory=str(tmp_path))
    folder = next(Path(results.output_directory).rglob("adapter_config.json")).parent
    assert (folder / "adapter_model.safetensors").exists()
