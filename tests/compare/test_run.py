"""Running a comparison: nothing is trained twice, a failure does not stop the others, interrupted runs go on."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ludwig_peft_plugin.cli import app
from ludwig_peft_plugin.compare import run, worker
from ludwig_peft_plugin.compare.plan import Job
from ludwig_peft_plugin.compare.report import markdown, write_report
from ludwig_peft_plugin.compare.results import Result, failed, pareto_front, read_result, write_result

JOBS = [Job("base", {"a": 0}, 42), Job("lora", {"a": 1}, 42), Job("ia3", {"a": 2}, 42)]


def train_for_real(trained: list[str], broken: str = "") -> Any:
    """Return a runner that writes results as the worker does, and fails or crashes for one method."""

    def runner(folder: Path) -> int:
        job = json.loads((folder / "job.json").read_text())
        trained.append(job["method"])
        if job["method"] == broken:
            return 137
        write_result(folder, Result(job["method"], job["key"], trained=len(trained), total=100, test_loss=1.0))
        return 0

    return runner


def test_what_is_done_is_not_repeated_and_what_failed_is(tmp_path):
    trained: list[str] = []
    results = run.run_jobs(JOBS, tmp_path, runner=train_for_real(trained, broken="lora"))
    assert [result.method for result in results] == trained == ["base", "lora", "ia3"]
    assert "exit code 137" in str(results[1].error)
    (tmp_path / "lora" / "left_over").write_text("of the failed run")
    trained.clear()
    results = run.run_jobs(JOBS, tmp_path, runner=train_for_real(trained))
    assert trained == ["lora"]
    assert not (tmp_path / "lora" / "left_over").exists()
    assert [result.error for result in results] == [None, None, None]


def test_several_at_once_wait_for_the_first_and_come_back_in_order(tmp_path):
    together, first = threading.Barrier(2, timeout=30), threading.Event()

    def runner(folder: Path) -> int:
        job = json.loads((folder / "job.json").read_text())
        if job["method"] == "base":
            first.set()
        else:
            assert first.is_set()
            together.wait()  # only passed by two that run at the same time
        write_result(folder, Result(job["method"], job["key"], trained=1, total=100, test_loss=1.0))
        return 0

    results = run.run_jobs(JOBS, tmp_path, at_once=2, runner=runner)
    assert [result.method for result in results] == ["base", "lora", "ia3"]


def test_runs_at_once_share_the_gpus_evenly(tmp_path, monkeypatch):
    seen: list[str | None] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(run, "run_process", lambda folder, device=None: seen.append(device) or 0)
    train = run.processes(2)
    for _ in range(4):
        train(tmp_path)
    assert sorted(seen) == ["3", "3", "5", "5"]
    assert run.processes(1) is run.run_process


def test_other_settings_are_trained_anew_and_an_interrupted_run_keeps_its_folder(tmp_path):
    trained: list[str] = []
    run.run_jobs(JOBS[:2], tmp_path, runner=train_for_real(trained))
    changed = [JOBS[0], Job("lora", {"a": 9}, 42)]
    run.run_jobs(changed, tmp_path, runner=train_for_real(trained))
    assert trained == ["base", "lora", "lora"]
    (tmp_path / "lora" / "result.json").unlink()
    (tmp_path / "lora" / "checkpoint").write_text("of the interrupted run")
    run.run_jobs(changed, tmp_path, runner=train_for_real(trained))
    assert (tmp_path / "lora" / "checkpoint").exists()


def test_the_pareto_front_has_what_nothing_smaller_beats():
    def result(method: str, trained: int, loss: float | None) -> Result:
        return Result(method, "", trained=trained, test_loss=loss)

    results = [result("big", 100, 1.0), result("small", 10, 1.2), result("worse", 50, 1.3), result("same", 10, 1.25)]
    assert pareto_front([*results, result("base", 0, 2.0), failed("bad", "", "x")]) == ["base", "small", "big"]


def test_the_report_has_every_method_its_failures_and_a_plot(tmp_path):
    results = [
        Result("base", "", 0, 1000, 2.1, 2.0, device="cpu"),
        Result("lora", "", 50, 1050, 1.1, 1.0, 1.15, 1.05, 12.0, 2**30, "cpu", 10, 1e-3),
        failed("ia3", "", "it did not\nwork"),
    ]
    paths = write_report(tmp_path, results, "methods")
    assert {path.name for path in paths} == {"report.md", "report.json", "report.svg"}
    text = (tmp_path / "report.md").read_text()
    assert "| **lora** | 50 | 4.762% | 1.0000 | 1.1000 | 1.1500 | 1.00 GiB | 12 | 0.001 |" in text
    assert "- `ia3`: it did not work" in text
    assert text.index("lora") < text.index("| **base**")
    assert json.loads((tmp_path / "report.json").read_text())["pareto_front"] == ["base", "lora"]
    drawing = (tmp_path / "report.svg").read_text()
    assert "lora" in drawing
    assert "Pareto front" in drawing
    assert "report.svg" not in markdown(results, "methods", with_plot=False)


@pytest.fixture
def job(tmp_path, registered):
    """A small run of LoRA, ready for the worker, on rows of the shipped data."""
    import pandas as pd

    data = Path(__file__).resolve().parents[2] / "datasets" / "stdlib_instructions.csv"
    frame = pd.read_csv(data, keep_default_na=False)
    frame = frame[frame["output"].str.len() + frame["instruction"].str.len() < 260].head(32).reset_index(drop=True)
    frame.assign(split=[0] * 16 + [1] * 8 + [2] * 8).to_csv(tmp_path / "rows.csv", index=False)
    config = {
        "model_type": "llm",
        "base_model": "tiny-llama-python",
        "dataset": str(tmp_path / "rows.csv"),
        "prompt": {"template": "{instruction}\n{input}\n"},
        "input_features": [{"name": "prompt", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "preprocessing": {"split": {"type": "fixed"}},
        "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
        "trainer": {"type": "finetune", "epochs": 2, "batch_size": 4, "learning_rate": 5e-3},
        "generation": {"max_new_tokens": 4},
        "backend": {"type": "local"},
    }
    return Job("lora", config, 42)


def test_the_worker_measures_and_resumes_to_the_same_result(tmp_path, job, monkeypatch):
    whole, broken = tmp_path / "whole" / "lora", tmp_path / "broken" / "lora"
    for folder in (whole, broken):
        run._prepare(folder, job)
    expected = worker.run_job(whole)
    assert expected.trained == 5 * 4 * ((256 + 256) + (256 + 64))
    assert expected.steps == 8
    assert expected.learning_rate == 5e-3
    assert expected.peak_bytes
    assert expected.peak_bytes > 100 * 2**20
    assert expected.validation_loss is not None
    assert expected.validation_loss <= expected.final_validation_loss

    from ludwig_peft_plugin.training.trainer import PeftTrainer

    original = PeftTrainer.save_checkpoint

    def interrupt(self: Any, *args: Any) -> None:
        original(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftTrainer, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.run_job(broken)
    assert read_result(broken) is None
    monkeypatch.undo()
    resumed = worker.run_job(broken)
    assert (resumed.test_loss, resumed.final_validation_loss) == (expected.test_loss, expected.final_validation_loss)
    assert resumed.seconds > json.loads((broken / "seconds.json").read_text())


def test_the_worker_records_why_a_run_failed(tmp_path, job):
    job.config["adapter"]["target_modules"] = ["wrong"]
    folder = tmp_path / "lora"
    run._prepare(folder, job)
    with pytest.raises(Exception, match="wrong"):
        worker.run_job(folder)
    assert "wrong" in str(read_result(folder).error)


def test_the_command_reports_and_its_exit_code_tells_of_failures(tmp_path, job, monkeypatch):
    monkeypatch.setattr(run, "run_process", train_for_real([], broken="dora"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**job.config, "compare": {"dora": {"r": 2}}}))
    arguments = ["compare", str(path), "--methods", "lora,dora", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "dora" in result.stderr
    assert "lora: loss 1.0000" in result.stdout
    assert "`dora`" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.setattr(run, "run_process", train_for_real([]))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments[:3], "nothing", *arguments[4:]]).exit_code == 1
