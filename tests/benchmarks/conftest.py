"""Make the benchmarks, which are no part of the package, importable; and records as run.py writes them."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture
def record() -> Any:
    """Return a function that makes the record of a run of `runs.py` that went well, with values changed."""
    from benchmarks.gpu.runs import SUITES

    runs = {run.key: run for suite in SUITES.values() for run in suite}

    def make(key: str, call: str = "2026-01-01 10:00:00", **values: Any) -> dict[str, Any]:
        run = runs[key]
        setting = {**run.as_dict(), **values.pop("setting", {})}
        measured: dict[str, Any] = {"tok_s": 1000.0, "ms_step": 8000.0, "peak_gib": 40.0, "tokens": 8000, "loss": 12.0}
        if run.kind == "train":
            measured |= {"losses": [12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0], "gradient_norms": [1.0] * 8}
        return {"key": key, "status": "done", "setting": setting, "wall_s": 30.0, "call": call, **measured, **values}

    return make
