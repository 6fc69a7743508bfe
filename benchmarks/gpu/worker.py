"""One process, one run: import its tool, wait for the word, train, write what was measured.

usage: python -m benchmarks.gpu.worker RUN MODELS OUTPUT DEVICE      (RUN: the run as JSON; started by run.py)

The imports are made while the run before is still going on; the device is not touched until `go` is read.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.job import Job
from benchmarks.gpu.runs import OURS, PLAIN, STOCK, TRL, UNSLOTH, Run

MODULES = {OURS: "run_ours", PLAIN: "run_ours", STOCK: "run_stock", TRL: "run_trl_unsloth", UNSLOTH: "run_trl_unsloth"}
RESULT = "result.json"
GO = "go"


def main() -> None:
    """Run the job on the command line; the result is written to its output folder."""
    arguments = json.loads(sys.argv[1])
    models, output, device = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    run = Run(**arguments)
    name = "run_generation" if run.kind == "generate" else MODULES[run.tool]
    started = time.perf_counter()
    tool = importlib.import_module(f"benchmarks.gpu.{name}")
    tool.prepare(run.tool)
    imported = time.perf_counter() - started
    if sys.stdin.readline().strip() != GO:  # the runner has gone
        return
    output.mkdir(parents=True, exist_ok=True)
    result = {**tool.measure(Job(run, models, output, device)), "import_s": round(imported, 2)}
    (output / RESULT).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing down tens of GiB takes seconds that the next run needs


if __name__ == "__main__":
    main()
