"""The harness itself, end to end on a CPU: a checkpoint, rows, a few steps through `LudwigModel.train`."""

import dataclasses

import pytest
import torch

from benchmarks.gpu.gates import failures
from benchmarks.gpu.job import Job
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.runs import SUITES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    record = prepare(folder, "cpu", ["tiny"])
    assert record["checkpoints"]["tiny"]["written_gb"] >= 0
    assert record["rows"]["0"]["rows"] > 2000
    assert record.keys() >= {"device", "versions", "commit", "date"}, "run.py takes these from here"
    assert "torch" in record["versions"]
    return folder


def job(models, tmp_path, name: str, **changes) -> Job:
    (run,) = [run for run in SUITES["tiny"] if run.name == name]
    return Job(dataclasses.replace(run, **changes), models, tmp_path, "cpu")


def test_a_training_run(models, tmp_path, registered):
    from benchmarks.gpu import run_ours

    original = torch.nn.utils.clip_grad_norm_
    work = job(models, tmp_path, "ours-lora", batch=4, warm_up=2, steps=8, reference=None)
    result = run_ours.measure(work)
    record = {"key": work.run.key, "setting": work.run.as_dict(), "status": "done", **result}
    assert failures(record, {}) == []
    assert result["steps_done"] == 10
    assert result["tokens"] > 8 * 4 * 60
    assert result["first_step_s"] >= result["setup_s"] > 0
    assert torch.nn.utils.clip_grad_norm_ is original


def test_a_run_stops_when_it_has_enough_steps(models, tmp_path, registered):
    from benchmarks.gpu import run_ours

    result = run_ours.measure(job(models, tmp_path, "ours-lora", batch=2, warm_up=2, steps=20, stop=3))
    assert result["steps_done"] == len(result["losses"]) == len(result["gradient_norms"]) == 3


def test_an_evaluation_with_answers(models, tmp_path, registered):
    from benchmarks.gpu import run_generation

    result = run_generation.measure(job(models, tmp_path, "ours-generate", prompts=3))
    assert result["prompts"] == 3
    assert 0 < result["tokens"] <= 3 * run_generation.NEW_TOKENS
    assert 0 < result["answers_seconds"] < result["seconds"]
    assert result["tok_s"] == pytest.approx(result["tokens"] / result["seconds"], rel=1e-2)


def test_a_profile(models, tmp_path, registered):
    from benchmarks.gpu import profile

    trace = tmp_path / "x.trace.json.gz"
    result = profile.profile(job(models, tmp_path, "ours-lora", batch=2, warm_up=2, steps=5), 2, 2, trace)
    assert list(result["stages"]) == ["data", "forward", "loss", "backward", "optimiser", "logging"]
    total = sum(stage["host_ms"] for stage in result["stages"].values())
    assert total == pytest.approx(result["ms_step"], rel=0.2)
    assert result["kernels"][0]["ms_step"] > 0
    assert not any(kernel["name"].startswith("stage") for kernel in result["kernels"])
    assert trace.stat().st_size > 0
    text = profile.markdown(result)
    assert "| backward |" in text
