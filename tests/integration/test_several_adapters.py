"""Several adapters through Ludwig: train, save, reload, resume, export, and choose one when predicting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed_runs import KillAt, Killed
from ludwig.api import LudwigModel
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ludwig_peft_plugin.adapters.several.active import active_names, use_adapter
from ludwig_peft_plugin.commands.predict import run_ludwig
from ludwig_peft_plugin.errors import AdapterError, DataError
from ludwig_peft_plugin.model.base_model import resolve_base_model

LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_config, new_model, rows):
    """A run that trains `one` of two adapters, whose merge and whose own folders are exported; and its data."""
    folder = tmp_path_factory.mktemp("several")
    first = new_model(make_config(adapter={**LORA, "r": 2}, trainer={**TRAINER, "learning_rate": 2e-2}))
    source = first.train(dataset=rows, output_directory=str(folder / "first")).output_directory
    config = make_config(
        adapter=None,
        adapters={
            "adapters": {
                "one": LORA,
                "two": {**LORA, "r": 2, "pretrained_adapter_weights": os.path.join(source, "model", "model_weights")},
            },
            "merge": {"name": "both", "sources": ["one", "two"], "weights": [0.5, 0.5], "combination_type": "cat"},
            "column": "answers_by",
        },
        trainer=TRAINER,
        export=[
            {"format": "adapter"},
            {"format": "adapter", "adapter": "two"},
            {"format": "merged", "adapter": "both"},
        ],
    )
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(folder / "run"))
    return model, Path(results.output_directory), config


TRAINER: dict[str, Any] = {"type": "finetune", "epochs": 1, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def named_rows(rows):
    """Eight rows that name their adapters in turn; an empty cell is the active one."""
    return rows.tail(8).assign(answers_by=["one", "two", "both", "", "base", "two", None, "one"])


def answers(predictions: pd.DataFrame) -> list[str]:
    return (
        [str(text) for text in predictions["output_response"]]
        if "output_response" in predictions
        else [str(text) for text in predictions["output_predictions"]]
    )


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 40)[None]
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve_base_model("tiny-llama-python"), dtype=torch.float32)


def test_adapters_are_saved_reloaded_and_exported_each(trained):
    model, folder, _ = trained
    weights = folder / "model" / "model_weights"
    assert {entry.name for entry in weights.iterdir() if entry.is_dir()} == {"one", "two", "both"}
    loaded = LudwigModel.load(str(folder / "model"))
    assert active_names(loaded) == ["one"]
    seen = {}
    for name in ("one", "two", "both"):
        with use_adapter(model, name), use_adapter(loaded, name):
            seen[name] = logits(model.model.model)
            assert torch.equal(seen[name], logits(loaded.model.model))
            plain = PeftModel.from_pretrained(base(), str(weights / name))
            assert torch.allclose(seen[name], logits(plain), atol=1e-4)
    assert not torch.allclose(seen["one"], seen["two"], atol=1e-2)
    exported = folder / "exported"
    for name, written in (("one", exported / "adapter"), ("two", exported / "two" / "adapter")):
        assert torch.allclose(seen[name], logits(PeftModel.from_pretrained(base(), str(written))), atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(exported / "both" / "merged", dtype=torch.float32)
    assert torch.allclose(seen["both"], logits(merged), atol=1e-3)


def test_rows_are_answered_by_the_adapter_they_name(trained, named_rows):
    model, _, _ = trained
    mixed, _ = model.predict(named_rows, skip_save_predictions=True, skip_save_unprocessed_output=True)
    expected = []
    for row in range(len(named_rows)):
        name = named_rows["answers_by"].fillna("").iloc[row] or "one"
        one = named_rows.iloc[[row]].assign(answers_by="")
        settings = {"adapter": name}
        prediction, _ = model.predict(one, generation_config=settings)
        expected += answers(prediction)
    assert answers(mixed) == expected
    assert len(set(expected)) > 1


def test_losses_are_those_of_the_named_adapters(trained, named_rows):
    model, _, _ = trained
    stats, _, _ = model.evaluate(named_rows, collect_predictions=False)
    total = tokens = 0.0
    for name, group in named_rows.assign(by=named_rows["answers_by"].replace("", None).fillna("one")).groupby("by"):
        with use_adapter(model, name):
            part, _, _ = model.evaluate(group.assign(answers_by=""), collect_predictions=False)
        count = _target_tokens(model, group)
        total, tokens = total + part["output"]["loss"] * count, tokens + count
    assert stats["output"]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def _target_tokens(model: Any, frame: pd.DataFrame) -> int:
    encode = model.model.tokenizer.encode
    return sum(len(encode(text, add_special_tokens=False)) + 1 for text in frame["output"])


def test_a_column_that_names_no_adapter_is_an_error(trained, named_rows):
    model, _, _ = trained
    with pytest.raises(DataError, match=r"names the adapter 'three'.*there are one, two, both, base"):
        model.predict(named_rows.assign(answers_by="three"))
    with pytest.raises(DataError, match="no column 'answers_by'"):
        model.predict(named_rows.drop(columns="answers_by"))
    with pytest.raises(AdapterError, match="no adapter of this name"):
        model.predict(named_rows, generation_config={"adapter": "three"})


def test_the_command_line_chooses_an_adapter(trained, named_rows, tmp_path):
    model, folder, _ = trained
    data = tmp_path / "rows.csv"
    named_rows.head(3).assign(answers_by="").to_csv(data, index=False)
    made = {}
    for name in (None, "two", "base"):
        out = tmp_path / str(name)
        arguments = ["--model_path", str(folder / "model"), "--dataset", str(data), "--output_directory", str(out)]
        run_ludwig("predict", name, arguments)
        made[name] = answers(pd.read_parquet(out / "predictions.parquet"))
    for name, texts in made.items():
        expected, _ = model.predict(
            named_rows.head(3).assign(answers_by=""), generation_config={"adapter": name or "one"}
        )
        assert texts == [str(list(text)) if isinstance(text, np.ndarray) else text for text in answers(expected)], name
    assert len({str(texts) for texts in made.values()}) == 3


def test_resuming_gives_the_adapters_of_an_uninterrupted_run(make_config, new_model, rows, tmp_path):
    config = make_config(
        adapter=None,
        adapters={"adapters": {"one": LORA, "two": {**LORA, "init_lora_weights": "eva"}}, "active": ["one", "two"]},
        trainer={"type": "finetune", "epochs": 2, "batch_size": 8, "learning_rate": 5e-3},
    )

    whole = new_model(config)
    whole.train(dataset=rows, output_directory=str(tmp_path / "whole"))
    broken = LudwigModel(config, callbacks=[KillAt(epoch=1)])
    with pytest.raises(Killed):
        broken.train(dataset=rows, output_directory=str(tmp_path / "broken"))
    run = next((tmp_path / "broken").iterdir())
    resumed = new_model(config)
    resumed.train(dataset=rows, model_resume_path=str(run))
    for name in ("one", "two"):
        with use_adapter(whole, name), use_adapter(resumed, name):
            assert torch.equal(logits(whole.model.model), logits(resumed.model.model))


def test_trained_adapters_are_used_without_training(trained, make_config, new_model, rows, tmp_path):
    _, folder, _ = trained
    weights = folder / "model" / "model_weights"
    merge = {"name": "mix", "sources": ["a", "b"], "weights": [0.5, 0.5], "combination_type": "cat"}
    config = make_config(
        adapter=None,
        adapters={
            "adapters": {
                "a": {**LORA, "pretrained_adapter_weights": str(weights / "one")},
                "b": {**LORA, "r": 2, "pretrained_adapter_weights": str(weights / "two")},
            },
            "merge": merge,
            "active": "mix",
        },
        trainer={"type": "none"},
    )
    model = new_model(config)
    model.train(dataset=rows, output_directory=str(tmp_path))
    plain = PeftModel.from_pretrained(base(), str(weights / "both"))
    assert torch.allclose(logits(model.model.model), logits(plain), atol=1e-4)
    loaded = LudwigModel.load(str(next(tmp_path.iterdir()) / "model"))
    assert active_names(loaded) == ["mix"]
    assert torch.equal(logits(model.model.model), logits(loaded.model.model))
