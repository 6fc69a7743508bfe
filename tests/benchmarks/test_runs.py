"""The runs and suites, and the configs our runs make of them."""

from pathlib import Path

import pytest

from benchmarks.gpu.job import Job
from benchmarks.gpu.runs import OURS, PLAIN, SUITES, select
from benchmarks.gpu.shapes import SHAPES
from benchmarks.targets import CHART, CURVES, TARGETS, label

RUNS = {run.key: run for suite in SUITES.values() for run in suite}


def test_a_name_means_one_run():
    for runs in SUITES.values():
        assert len({run.key for run in runs}) == len(runs)
    for suite in SUITES.values():
        for run in suite:
            assert RUNS[run.key] == run


def test_every_reference_is_a_run_on_the_same_rows():
    named = [run for run in RUNS.values() if run.reference]
    assert named
    for run in named:
        other = RUNS[f"{run.shape}/{run.reference}"]
        for field in ("method", "packing", "batch", "length", "row_length", "warm_up", "steps"):
            assert getattr(other, field) == getattr(run, field), f"{run.key}: {field}"


def test_every_number_of_the_8b_and_1b_runs_is_compared():
    ours = [run for run in RUNS.values() if run.tool == OURS and run.kind == "train" and run.shape in ("8b", "1b")]
    uncompared = {run.name for run in ours if run.reference is None}
    assert uncompared == {"ours-lora-bfloat16-300", "ours-lora-bfloat16-300-control"}


def test_plain_runs_stop_early_on_the_same_schedule():
    plain = RUNS["8b/plain-lora-pack"]
    assert (plain.tool, plain.stop, plain.overrides) == (PLAIN, 8, {"precision": "float32"})
    assert plain.steps == RUNS["8b/ours-lora-pack"].steps


def test_runs_are_selected_by_name_or_key():
    names = ["unsloth-lora-pack", "8b/ours-lora-pack"]
    assert [run.name for run in select(["8b"], names)] == ["unsloth-lora-pack", "ours-lora-pack"]
    assert len(select(["8b", "8b-plain"])) == len(SUITES["8b"]) + len(SUITES["8b-plain"])
    with pytest.raises(KeyError, match="ours-lora-pack"):
        select(["8b"], ["nonsense"])


def test_targets_chart_and_curves_name_runs_that_exist():
    named = {target.run for target in TARGETS} | {key for target in TARGETS for key in target.peers}
    named |= {key for target in TARGETS for key, _ in target.ratios}
    named |= {key for _, keys in CHART for key in keys} | {key for _, *keys in CURVES for key in keys}
    assert named <= set(RUNS)
    assert all(label(key) for key in named)


@pytest.mark.parametrize("key", [key for key, run in RUNS.items() if run.tool == OURS])
def test_the_configs_of_our_runs_are_valid(key, registered):
    from benchmarks.gpu import run_ours
    from ludwig_peft_plugin.config.strict import check_config

    run = RUNS[key]
    config = run_ours.config(Job(run, Path("models"), Path("out"), "cuda"))
    check_config(config)
    assert config["adapter"]["type"] == run.method
    assert ("packing" in config["trainer"]) == run.packing


def test_overrides_reach_the_config():
    from dataclasses import replace

    from benchmarks.gpu import run_ours

    run = replace(RUNS["8b/ours-lora"], overrides={"trainer.compile": True, "precision": "bfloat16"})
    config = run_ours.config(Job(run, Path("models"), Path("out"), "cuda"))
    assert config["trainer"]["compile"] is True
    assert config["precision"] == "bfloat16"


def test_stock_ludwig_refuses_what_it_has_not():
    from benchmarks.gpu import run_stock

    with pytest.raises(ValueError, match="ours-lora-pack"):
        run_stock.config(Job(RUNS["8b/ours-lora-pack"], Path("models"), Path("out"), "cuda"))
    assert (
        run_stock.config(Job(RUNS["8b/stock-lora"], Path("models"), Path("out"), "cuda"))["trainer"]["batch_size"] == 8
    )


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.24), ("8b", 8.03), ("70b", 70.55)])
def test_the_shapes_have_the_parameters_of_the_models_they_are_named_after(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_limit_is_four_operations_a_parameter():
    assert SHAPES["8b"].limit(788e12) == pytest.approx(24_500, rel=0.01)
