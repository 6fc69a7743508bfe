"""The command line, and what a command writes."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def command():
    path = list(sys.path)
    from benchmarks.gpu import run

    sys.path[:] = path  # as a command it puts the repository in place of its own folder
    return run


def options(command, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "8b", "--out", "out", *arguments])
    return command._options()


def test_options(command, monkeypatch):
    parsed = options(
        command, monkeypatch, "--suite", "1b", "--runs", "a,b", "--set", "trainer.compile=true", "--set", "x=y"
    )
    assert parsed.suite == ["8b", "1b"]
    assert parsed.runs == ["a", "b"]
    assert dict(parsed.set) == {"trainer.compile": True, "x": "y"}
    assert (parsed.device, parsed.budget) == ("cuda", 570.0)


def test_an_unknown_suite_is_refused(command, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        options(command, monkeypatch, "--suite", "9b")
    assert "9b" in capsys.readouterr().err


def test_the_document_keeps_the_runs_of_the_one_it_continues(command, monkeypatch, tmp_path, record):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"runs": {"8b/trl-lora": record("8b/trl-lora", "2026-01-01 09:00:00")}}))
    document = command._document(options(command, monkeypatch, "--merge", str(earlier)))
    assert document["runs"]["8b/trl-lora"]["call"] == "2026-01-01 09:00:00"
    assert document["call"] != "2026-01-01 09:00:00"


def test_what_is_written_says_what_is_not_kept(command, tmp_path, record):
    runs = [record("8b/ours-lora-pack"), record("8b/trl-lora")]
    command._write({"runs": {run["key"]: run for run in runs}}, tmp_path / "gpu.json")
    written = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert written["8b/trl-lora"]["not_kept_because"] == []
    assert "plain-lora-pack" in written["8b/ours-lora-pack"]["not_kept_because"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_run_is_one_line(command, record):
    line = command.line(record("8b/trl-lora", first_step_s=12.3, compile_s=0.0))
    assert "\n" not in line
    for part in ("8b/trl-lora", "1,000.0 tok/s", "40.00 GiB", "loss 12.000 -> 5.000", "first_step 12.3 s"):
        assert part in line
    failed = record("8b/trl-lora", status="failed with exit code 1", error=["Traceback", "ValueError: no"])
    assert "ValueError: no" in command.line(failed)
