"""Scores and examples of generated answers in a real run: while training, after it, and in `evaluate`."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ludwig_peft_plugin.evaluation.text_metrics import TEXT_METRICS, score_texts

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "parses"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """32 short rows: 16 to train, 8 to validate, 8 to test."""
    frame = pd.read_csv(ROOT / "datasets" / "stdlib_instructions.csv", keep_default_na=False)
    frame = frame[frame["output"].str.len() + frame["instruction"].str.len() < 260].head(32).reset_index(drop=True)
    return frame.assign(split=[0] * 16 + [1] * 8 + [2] * 8)


@pytest.fixture(scope="module")
def new_model(registered):
    """Return a function that makes a LudwigModel with the given sections changed."""
    from ludwig.api import LudwigModel

    def make(**changes):
        config = {
            "model_type": "llm",
            "base_model": "tiny-llama-python",
            "prompt": {"template": "### Instruction: {instruction}\n### Response:\n"},
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "preprocessing": {"split": {"type": "fixed"}},
            "adapter": {"type": "lora", "r": 4},
            "trainer": {"type": "finetune", "epochs": 2, "batch_size": 4, "learning_rate": 5e-3},
            "generation": {"do_sample": False, "max_new_tokens": 12},
            "backend": {"type": "local"},
        }
        return LudwigModel({**config, **changes}, logging_level=logging.ERROR)

    return make


@pytest.fixture(scope="module")
def trained(new_model, rows, tmp_path_factory):
    """A run that scores answers while training and keeps the model with the best chrF."""
    model = new_model(
        evaluation={"during_training": True, "language": "python", "rows": 5, "examples": 3},
        trainer={
            "type": "finetune",
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 5e-3,
            "validation_metric": "chrf",
        },
    )
    results = model.train(dataset=rows, output_directory=str(tmp_path_factory.mktemp("run")))
    return model, results, Path(results.output_directory)


def test_scores_while_training_lie_beside_the_loss(trained):
    _, results, _ = trained
    for stats in (results.train_stats.validation["output"], results.train_stats.test["output"]):
        assert set(stats) >= SCORES | {"loss", "perplexity"}
        assert {len(values) for values in stats.values()} == {2}, "one value an epoch"
        for name in SCORES:
            assert all(0 <= value <= TEXT_METRICS[name].highest for value in stats[name])
    assert not SCORES & set(results.train_stats.training["output"])


def test_the_model_with_the_best_score_is_kept(trained):
    _, results, run = trained
    progress = json.loads((run / "model" / "training_progress.json").read_text())
    assert progress["best_eval_metric_value"] == max(results.train_stats.validation["output"]["chrf"])
    assert progress["best_eval_metric_value"] > 0


def test_examples_of_each_evaluation_lie_in_the_models_folder(trained, rows):
    _, _, run = trained
    folder = run / "model" / "llm_eval_examples"
    names = {
        f"{split}_step_{step}.{kind}" for split in ("validation", "test") for step in (4, 8) for kind in ("jsonl", "md")
    }
    assert names <= {path.name for path in folder.iterdir()}
    examples = [json.loads(line) for line in (folder / "validation_step_8.jsonl").read_text().splitlines()]
    assert [example["row"] for example in examples] == [0, 2, 4], "three of the five rows generated for"
    expected = rows[rows["split"] == 1].reset_index(drop=True)
    for example in examples:
        assert example["target"] == expected["output"][example["row"]]
        assert expected["instruction"][example["row"]] in example["prompt"]
        assert set(example) == {"row", "prompt", "target", "answer", "exact_match", "chrf", "parses"}
    assert len(list(folder.glob("*.csv"))) == 2, "Ludwig's own files are still there"


@pytest.fixture(scope="module")
def evaluated(trained, rows, tmp_path_factory):
    model, *_ = trained
    folder = tmp_path_factory.mktemp("evaluated")
    data = rows[rows["split"] == 2]
    stats, predictions, _ = model.evaluate(
        data, collect_predictions=True, skip_save_eval_stats=False, output_directory=str(folder)
    )
    return stats["output"], predictions, folder, data.reset_index(drop=True)


def test_statistics_hold_the_scores_of_the_predictions(evaluated):
    stats, predictions, folder, data = evaluated
    saved = json.loads((folder / "test_statistics.json").read_text())["output"]
    assert saved == pytest.approx(stats)
    answers = predictions["output_response"].tolist()
    assert len(answers) == len(data)
    expected = score_texts(answers, data["output"].tolist(), sorted(SCORES), "python")
    assert {name: stats[name] for name in SCORES} == pytest.approx(expected)
    assert stats["loss"] > 0


def test_evaluate_writes_examples_beside_the_statistics(evaluated):
    _, predictions, folder, data = evaluated
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert [example["row"] for example in examples] == [0, 4, 7]
    for example in examples:
        assert example["answer"] == predictions["output_response"].iloc[example["row"]]
        assert example["target"] == data["output"][example["row"]]
    assert "## Row 4" in (folder / "examples.md").read_text()


def test_without_predictions_there_are_losses_alone(trained, rows, tmp_path):
    model, *_ = trained
    stats, _, _ = model.evaluate(rows.tail(4), skip_save_eval_stats=False, output_directory=str(tmp_path))
    assert not SCORES & set(stats["output"])
    assert not list(tmp_path.glob("examples*"))
    assert (tmp_path / "test_statistics.json").exists()


def test_nothing_is_written_that_was_not_asked_for(trained, rows, tmp_path):
    model, *_ = trained
    model.evaluate(rows.tail(2), collect_predictions=True, output_directory=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_by_default_training_generates_three_short_answers(new_model, rows, tmp_path):
    model = new_model(trainer={"type": "finetune", "train_steps": 2, "batch_size": 4})
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    assert not SCORES & set(results.train_stats.validation["output"])
    folder = Path(results.output_directory) / "model" / "llm_eval_examples"
    (lines,) = folder.glob("*.jsonl")
    assert lines.name == "validation_step_2.jsonl"
    assert [json.loads(line)["row"] for line in lines.read_text().splitlines()] == [0, 1, 2]


def test_no_metrics_and_no_examples_when_switched_off(new_model, rows, tmp_path):
    model = new_model(
        evaluation={"metrics": [], "examples": 0}, trainer={"type": "finetune", "train_steps": 1, "batch_size": 4}
    )
    model.train(dataset=rows, output_directory=str(tmp_path))
    stats, predictions, _ = model.evaluate(
        rows.tail(2), collect_predictions=True, skip_save_eval_stats=False, output_directory=str(tmp_path / "out")
    )
    assert len(predictions) == 2
    assert not SCORES & set(stats["output"])
    assert not list((tmp_path / "out").glob("examples*"))


def test_the_loss_does_not_depend_on_how_many_tokens_go_at_once(trained, monkeypatch):
    from ludwig_peft_plugin.evaluation import predictor

    model, results, _ = trained
    data = results.preprocessed_data.test_set
    losses = []
    for tokens in (1, 70, 10_000):
        monkeypatch.setattr(predictor, "pass_tokens", lambda base, device, tokens=tokens: tokens)
        losses.append(model.evaluate(data)[0]["output"]["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_targets_are_the_texts_of_the_data_however_long(new_model, rows, tmp_path):
    """A target that is cut for training is still the whole text when answers are compared with it."""
    model = new_model(
        preprocessing={"split": {"type": "fixed"}, "global_max_sequence_length": 40},
        trainer={"type": "finetune", "train_steps": 1, "batch_size": 4},
        generation={"do_sample": False, "max_new_tokens": 4},
    )
    model.train(dataset=rows, output_directory=str(tmp_path))
    model.evaluate(rows, collect_predictions=True, skip_save_eval_stats=False, output_directory=str(tmp_path / "out"))
    examples = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 20
    assert {example["target"] for example in examples} <= set(rows["output"]), "whole texts of the data"
