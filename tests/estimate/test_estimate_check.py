"""The script that compares estimates with the benchmarks' measured peaks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(registered: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module; benchmarks are not part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import estimate_check

    return estimate_check


def record(tool: str, peak: float | None, **setting: Any) -> dict[str, Any]:
    from benchmarks.gpu.runs import Run

    run = Run(f"{tool}-lora-pack", tool, "tiny", **{"packing": True, "batch": 2, "length": 128, **setting})
    measured = {} if peak is None else {"peak_gib": peak}
    return {"key": run.key, "setting": run.as_dict(), "status": "done", **measured}


def test_compares_our_training_runs_with_a_peak(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUDWIG_PEFT_FUSED", raising=False)
    records = [
        record("ours", 0.08),
        record("plain", 0.08),
        record("ours", None),
        record("trl", 1.0),
        record("ours", 0.1, kind="generate"),
    ]
    ours, plain = script.comparisons(records)
    assert ours["tokens"] == plain["tokens"] == 256
    assert ours["error"] == pytest.approx(ours["estimated_gib"] / 0.08 - 1, abs=0.01)
    assert sum(ours["parts_gib"].values()) == pytest.approx(ours["estimated_gib"], abs=0.005)
    assert plain["parts_gib"]["activations"] >= ours["parts_gib"]["activations"]
    assert "LUDWIG_PEFT_FUSED" not in os.environ


def test_the_largest_step_is_taken_from_what_is_known(script: Any) -> None:
    from benchmarks.gpu.runs import Run

    unpacked = Run("ours-lora", "ours", "tiny", batch=8, steps=4)
    assert script.step_tokens(unpacked, {"tokens": 4000}) == 1000
    assert script.step_tokens(unpacked, {"tokens": 4000, "max_step_tokens": 1400}) == 1400
    assert script.step_tokens(Run("ours-lora-pack", "ours", "tiny", packing=True), {"tokens": 9}) == 8 * 1024


def test_table_file_and_exit_code(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, out = tmp_path / "gpu.json", tmp_path / "check.json"

    def run(peak: float, *options: str) -> int:
        document = {"call": "now", "runs": {"tiny/ours-lora-pack": record("ours", peak)}}
        results.write_text(json.dumps(document), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["estimate_check", str(results), "--out", str(out), *options])
        code: int = script.main()
        return code

    assert run(1.0) == 1
    written = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert written["measured_gib"] == 1.0
    assert run(written["estimated_gib"]) == 0
    assert run(1.0, "--tolerance", "1") == 0
    assert "tiny/ours-lora-pack" in capsys.readouterr().out
    results.write_text(json.dumps({"runs": {}}), encoding="utf-8")
    assert script.main() == 1
