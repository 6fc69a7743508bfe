"""Soft prompts through Ludwig's API: training, resuming, predicting and exporting on the shipped model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed_runs import KillAt, Killed
from peft import PeftModel
from safetensors.torch import load_file

from ludwig_peft_plugin.errors import DataError
from ludwig_peft_plugin.model.base_model import load_model_config

TRAINER = {
    "type": "finetune",
    "epochs": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_checkpoint": 4,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "prefix": {"type": "prefix", "num_virtual_tokens": 8, "prefix_projection": True},
    "lstm": {"type": "p_tuning", "num_virtual_tokens": 6, "encoder_reparameterization_type": "LSTM"},
    "multitask": {"type": "multitask_prompt_tuning", "num_virtual_tokens": 6, "task_column": "kind", "num_tasks": 2},
    "cartridge": {"type": "cartridge", "num_virtual_tokens": 8, "init": "text", "init_text": "def mean(values):"},
    "adaption": {"type": "adaption_prompt"},
}


VIRTUAL = 400


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model_weights" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tasked(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(kind=np.arange(len(rows)) % 2)


@pytest.mark.parametrize("name", ADAPTERS)
def test_runs_resume_and_predict(
    name: str, make_config: Any, new_model: Any, tasked: pd.DataFrame, tmp_path: Path
) -> None:
    config = make_config(
        adapter=ADAPTERS[name],
        trainer={**TRAINER, "enable_gradient_checkpointing": name in ("prefix", "lstm")},
        generation={"do_sample": False, "max_new_tokens": 6},
    )
    model = new_model(config)
    whole = model.train(dataset=tasked, output_directory=str(tmp_path / "whole"))
    losses = whole.train_stats.training["output"]["loss"]
    assert losses[-1] != losses[0]
    with pytest.raises(Killed):
        new_model(config).train(dataset=tasked, output_directory=str(tmp_path / "killed"), callbacks=[KillAt(7)])
    (run,) = (tmp_path / "killed").iterdir()
    resumed = new_model(config).train(dataset=tasked, model_resume_path=str(run))
    assert resumed.train_stats.training["output"]["loss"] == losses
    expected, found = weights(whole.output_directory), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    from ludwig.api import LudwigModel

    few = tasked.tail(6)
    predicted, _ = model.predict(dataset=few)
    loaded = LudwigModel.load(str(Path(whole.output_directory) / "model"), logging_level=40)
    again, _ = loaded.predict(dataset=few)
    assert [list(row) for row in predicted["output_predictions"]] == [list(row) for row in again["output_predictions"]]
    statistics, _, _ = loaded.evaluate(dataset=few)
    assert statistics["output"]["loss"] > 0


def test_tasks_take_part(make_config: Any, new_model: Any, tasked: pd.DataFrame, tmp_path: Path) -> None:
    """Rows of another task are answered with another prompt, and data without the column are refused."""
    config = make_config(adapter=ADAPTERS["multitask"], trainer={**TRAINER, "learning_rate": 0.3})
    model = new_model(config)
    model.train(dataset=tasked, output_directory=str(tmp_path))
    first = model.evaluate(dataset=tasked.tail(6).assign(kind=0))[0]["output"]["loss"]
    second = model.evaluate(dataset=tasked.tail(6).assign(kind=1))[0]["output"]["loss"]
    assert first != second
    with pytest.raises(DataError, match=r"adapter.task_column names the column 'kind'"):
        model.predict(dataset=tasked.drop(columns="kind"))
    with pytest.raises(DataError, match="A task is one of 0 to 1"):
        model.predict(dataset=tasked.assign(kind=2))


def test_virtual_tokens_count_toward_the_context(
    make_config: Any, new_model: Any, rows: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model(make_config(adapter={"type": "prompt_tuning", "num_virtual_tokens": VIRTUAL}))
    long = rows.assign(output=rows["output"] + " x" * 600)
    with caplog.at_level("WARNING"):
        training = model.preprocess(dataset=long).training_set
    context = load_model_config(model.config_obj).max_position_embeddings
    assert training.input_ids.lengths.max() == context - VIRTUAL
    assert f"rows of more than {context - VIRTUAL} tokens: 24" in caplog.text


def test_exports_load_with_plain_peft(make_config: Any, new_model: Any, rows: pd.DataFrame, tmp_path: Path) -> None:
    config = make_config(
        adapter={"type": "prefix_tuning", "num_virtual_tokens": 8, "prefix_projection": True},
        trainer={**TRAINER, "epochs": 1},
        export=[{"format": "adapter", "path": "shared"}],
    )
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    (folder,) = Path(results.output_directory).rglob("shared")
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PREFIX_TUNING"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        model.model.eval()
        expected = model.model.model(input_ids=ids).logits
        plain = PeftModel.from_pretrained(model.model.model.get_base_model(), str(folder))
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
