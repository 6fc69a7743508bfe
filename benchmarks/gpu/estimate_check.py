"""Compare `ludwig-peft estimate` with the peaks that the benchmarks have measured on a GPU.

usage: python -m benchmarks.gpu.estimate_check RESULTS [--out FILE] [--tolerance 0.1]

RESULTS is the JSON of benchmarks/gpu/run.py. Each of its training runs with this plugin (tools `ours` and `plain`) that
has a `peak_gib` is estimated anew from its setting; no GPU and no weights are needed. The largest step of a run is
taken from `max_step_tokens`, where a record has it, else from the batch (packed) or the mean step (unpacked). The table
is printed, the records are written to FILE, and the exit code is 1 if an error exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.job import Job
from benchmarks.gpu.run_ours import ENGINE_SWITCHES, config
from benchmarks.gpu.runs import OURS, PLAIN, Run
from benchmarks.gpu.shapes import SHAPES

GIB = 2**30
MEAN_ROW, LONGEST_ROW = 117, 340
"""Tokens of a row of the benchmarks' data, on average and at most; plain layers in float32 pad rows for attention."""


def main() -> int:
    """Print and record estimates beside measured peaks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1)
    options = parser.parse_args()
    document = json.loads(options.results.read_text(encoding="utf-8"))
    found = list(comparisons(document["runs"].values()))
    if not found:
        print("No run of this plugin with a measured peak is in the file.")
        return 1
    print(f"{'run':<40} {'measured':>9} {'estimate':>9} {'error':>7}")
    for entry in found:
        print(
            f"{entry['key']:<40} {entry['measured_gib']:>9.2f} {entry['estimated_gib']:>9.2f} {entry['error']:>+7.1%}"
        )
    if options.out is not None:
        options.out.write_text(json.dumps({"call": document.get("call"), "runs": found}, indent=2) + "\n")
    return int(any(abs(entry["error"]) > options.tolerance for entry in found))


def comparisons(records: Any) -> Iterator[dict[str, Any]]:
    """Yield, for each record of a training run of ours, its measured peak, the estimate and the relative error."""
    from ludwig_peft_plugin.register import register

    register()
    with TemporaryDirectory() as folder:
        models = Path(folder)
        for record in records:
            setting = record["setting"]
            if setting["tool"] not in (OURS, PLAIN) or setting["kind"] != "train" or "peak_gib" not in record:
                continue
            run = Run(**setting)
            estimate = estimated(run, models, step_tokens(run, record))
            measured = float(record["peak_gib"])
            yield {
                "key": record["key"],
                "tokens": estimate.shape.tokens,
                "measured_gib": measured,
                "estimated_gib": round(estimate.peak / GIB, 3),
                "error": round(estimate.peak / GIB / measured - 1, 4),
                "parts_gib": {part: round(size / GIB, 3) for part, size in estimate.at_peak.items()},
            }


def step_tokens(run: Run, record: dict[str, Any]) -> int:
    """Return the tokens of the largest step of a run, as far as its record knows."""
    if "max_step_tokens" in record:
        return int(record["max_step_tokens"])
    if run.packing or run.row_length:
        return run.batch * run.length
    return round(record["tokens"] / run.steps) if "tokens" in record else run.batch * MEAN_ROW


def estimated(run: Run, models: Path, tokens: int) -> Any:
    """Return the estimate of a run's config with micro-batches of `tokens`."""
    from ludwig.schema.model_types.base import ModelConfig

    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    _describe(run.shape, models)
    job = Job(run, models, models, "cuda")
    with _engine(run.tool):
        estimator = Estimator(ModelConfig.from_dict(config(job)))
        longest = min(run.row_length or LONGEST_ROW, tokens)
        sequences = max(1, tokens // (run.row_length or MEAN_ROW))
        return estimator.estimate(BatchShape(tokens, sequences, longest, max(1, tokens - sequences)))


def _describe(shape: str, models: Path) -> None:
    """Write the config.json of a shape; the plugin's own models are there."""
    if shape in SHAPES and not (models / shape).is_dir():
        (models / shape).mkdir()
        (models / shape / "config.json").write_text(json.dumps(SHAPES[shape].config()), encoding="utf-8")
        (models / shape / "model.safetensors").touch()  # a base without weights is refused; none are read here


@contextmanager
def _engine(tool: str) -> Iterator[None]:
    """Switch the engine off for plain runs, as the run itself does."""
    before = {name: os.environ.get(name) for name in ENGINE_SWITCHES}
    if tool == PLAIN:
        os.environ.update(dict.fromkeys(ENGINE_SWITCHES, "0"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
