"""The tables and the chart are what the recorded results say."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.gpu.results import Results
from benchmarks.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path):
    """A copy of the files a report is made of and written to, without GPU results."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name in ("cpu_quickstart.json", "cpu_memory.json"):
        shutil.copy(report.RESULTS / name, results)
    (tmp_path / "docs").mkdir()
    for path in (report.README, report.PAGE):
        (tmp_path / path).write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n", encoding="utf-8")
    return tmp_path


def store(repository: Path, name: str, call: str, *records, flops: float | None = 800e12) -> None:
    document = {
        "call": call,
        "date": call[:10],
        "device": "GPU X",
        "versions": {"torch": "2.11.0"},
        "runs": {record["key"]: record for record in records},
    }
    if flops:
        document["ceilings"] = {"matmul_flops": flops}
    (repository / "benchmarks" / "results" / name).write_text(json.dumps(document), encoding="utf-8")


FIRST, SECOND = "2026-01-01 10:00:00", "2026-01-02 10:00:00"


def test_the_repository_is_up_to_date():
    assert report.outdated(ROOT) == []


def test_values_ratios_and_goals(repository, record):
    runs = [
        record("8b/ours-lora-pack", FIRST, tok_s=20_000.0, peak_gib=39.5),
        record("8b/plain-lora-pack", FIRST),
        record("8b/unsloth-lora-pack", FIRST, tok_s=7_000.0, peak_gib=49.9),
        record("8b/trl-lora-pack", FIRST, tok_s=5_000.0, status="failed with exit code 1", error=["no"]),
    ]
    store(repository, "gpu.json", FIRST, *runs)
    report.write(repository)
    page = (repository / report.PAGE).read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| 8B, LoRA, bf16 base, packed |"))
    assert "**20,000 tok/s**" in row
    assert "≥ 19,000 tok/s, ≥ 2.6x Unsloth | yes |" in row
    assert "Unsloth 7,000 tok/s (2.86x)" in row
    assert "TRL + Liger: no result" in row
    assert "| 39.50 GiB" not in page
    assert "**39.50 GiB** | ≤ 40 GiB | yes |" in page
    assert "| 80% |" in page  # 20,000 of 800e12 / (4 x 8.03e9) = 24,900
    assert "not measured" in page
    readme = (repository / report.README).read_text(encoding="utf-8")
    assert "**20,000 tok/s**" in readme
    assert "not measured" not in readme
    assert readme.startswith("above\n")
    assert readme.endswith("below\n")
    assert report.outdated(repository) == []


def test_a_missed_goal_is_shown_as_missed(repository, record):
    runs = [record("8b/ours-lora-pack", FIRST, tok_s=20_000.0), record("8b/plain-lora-pack", FIRST)]
    store(repository, "gpu.json", FIRST, *runs, record("8b/unsloth-lora-pack", FIRST, tok_s=10_000.0))
    rows = report.target_rows(Results(repository / "benchmarks" / "results"))
    assert rows[0][3] == "no"  # the ratio is 2


def test_peers_of_the_same_call_are_preferred(repository, record):
    ours = record("8b/ours-lora-pack", FIRST), record("8b/plain-lora-pack", FIRST)
    store(repository, "gpu-1.json", FIRST, *ours, record("8b/unsloth-lora-pack", FIRST, tok_s=500.0))
    trl = record("8b/trl-lora-pack", SECOND, tok_s=250.0)
    store(repository, "gpu-2.json", SECOND, record("8b/unsloth-lora-pack", SECOND, tok_s=400.0), trl)
    row = report.target_rows(Results(repository / "benchmarks" / "results"))[0]
    assert "Unsloth 500 tok/s (2.00x)<br>" in row[4]
    assert row[4].endswith("TRL + Liger 250 tok/s (4.00x) †")


def test_a_record_with_peers_in_its_call_is_preferred_to_a_newer_one_without(repository, record):
    ours = record("8b/ours-lora-pack", FIRST, tok_s=900.0), record("8b/plain-lora-pack", FIRST)
    store(repository, "gpu-1.json", FIRST, *ours, record("8b/unsloth-lora-pack", FIRST, tok_s=500.0))
    later = record("8b/ours-lora-pack", SECOND, tok_s=700.0), record("8b/plain-lora-pack", SECOND)
    store(repository, "gpu-2.json", SECOND, *later)
    results = Results(repository / "benchmarks" / "results")
    assert "**900 tok/s**" in report.target_rows(results)[0][1]
    assert report.chart_values(results)[0][2] == 900.0
    assert results.get("8b/ours-lora-pack")["tok_s"] == 700.0


def test_numbers_that_do_not_count_are_not_shown(repository, record):
    store(repository, "gpu.json", FIRST, record("8b/ours-lora-pack", FIRST, tok_s=31_415.0))
    report.write(repository)
    page = (repository / report.PAGE).read_text(encoding="utf-8")
    assert "31,415" not in page
    assert "not compared with plain-lora-pack" in page


def test_a_change_of_the_results_is_noticed(repository, record):
    runs = [record("8b/ours-lora-pack", FIRST), record("8b/plain-lora-pack", FIRST)]
    store(repository, "gpu.json", FIRST, *runs)
    report.write(repository)
    assert report.outdated(repository) == []
    runs[0]["tok_s"] += 100
    store(repository, "gpu.json", FIRST, *runs)
    assert report.outdated(repository) == ["README.md", "docs/performance.md", "docs/performance.svg"]


def test_the_chart_is_the_same_for_the_same_values(tmp_path):
    bars = [("8B LoRA", "this plugin", 20_000.0), ("8B LoRA", "TRL + Liger", 5_000.0), ("8B QLoRA", "Unsloth", 9_000.0)]
    for name in ("one.svg", "two.svg"):
        report.draw(bars, tmp_path / name)
    one = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert one == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert "20,000" in one
    assert len(one) < 50_000


def test_markers_have_to_be_there():
    with pytest.raises(ValueError, match=r"README\.md needs the lines"):
        report.replaced("no markers", "text", "README.md")


def test_float8_curves_are_summed_up(repository, record):
    full = [10.0 - step / 50 for step in range(300)]
    low = [loss * 1.002 for loss in full]
    runs = [
        record("1b/ours-lora-bfloat16-300", FIRST, losses=full, gradient_norms=[1.0] * 300),
        record("1b/ours-lora-float8-300", FIRST, losses=low, gradient_norms=[1.0] * 300),
    ]
    store(repository, "gpu.json", FIRST, *runs)
    (line,) = report.curve_lines(Results(repository / "benchmarks" / "results"))
    assert "over 300 steps" in line
    assert "0.20%" in line


def test_every_target_says_what_to_reach():
    assert all(report.goal(target) for target in TARGETS)
