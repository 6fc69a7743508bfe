"""Run the three quick starts through `ludwig train` and record their peak memory and test loss on a CPU.

usage: python benchmarks/cpu_memory.py [OUT.json]      (default: benchmarks/results/cpu_memory.json)

The peak is the resident set of the `ludwig train` process, as the operating system counts it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import provenance  # noqa: E402

CONFIGS = ("quickstart_qlora", "quickstart_lora", "quickstart_dora")


def run(name: str) -> dict[str, Any]:
    """Train one config in a process of its own, whose peak memory is then that of this process's children."""
    with tempfile.TemporaryDirectory() as folder:
        ludwig = str(Path(sys.executable).with_name("ludwig"))
        subprocess.run(
            [ludwig, "train", "--config", f"configs/{name}.yaml", "--output_directory", folder, "-l", "error"],
            cwd=ROOT,
            check=True,
        )
        (statistics,) = Path(folder).glob("*/training_statistics.json")
        losses = json.loads(statistics.read_text(encoding="utf-8"))["test"]["output"]["loss"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"test_loss": min(losses), "peak_gib": round(peak, 2)}


def main() -> None:
    """Run each config in a child of its own, so that one's peak is not taken for the next one's."""
    if sys.argv[1:2] == ["--one"]:
        print("RESULT " + json.dumps(run(sys.argv[2])), flush=True)
        return
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "cpu_memory.json"
    results = {}
    for name in CONFIGS:
        done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        results[name] = json.loads(line[len("RESULT ") :])
        print(name, results[name], flush=True)
    record = {"results": results, **provenance()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
