"""Measure how fast data become tokens, how soon training starts, and how much memory a million rows take, on a CPU.

usage: python benchmarks/tokens.py [OUT.json]      (default: benchmarks/results/tokens.json)

The rows are those of datasets/stdlib_instructions.csv, repeated with a number in the instruction, as one CSV file. Each
measurement runs in a process of its own on two cores, one after the other, and its clock starts when `ludwig.api` has
been imported:

    stock, plugin   `LudwigModel.preprocess` of 25,000 rows, nothing kept on disk
    first step      from there to the end of the first optimiser step of `LudwigModel.train` (on one thread), tokens
                    not yet kept
    again           the same once more, now with the tokens of the run before
    million         `LudwigModel.preprocess` of 1,000,000 rows, tokens kept; memory is sampled all along
    million again   the same once more

The short ones run `REPEATS` times in turn, and the quickest counts. Processor seconds are those of all threads; beside
other work on the machine they say more than the clock does. Anonymous memory is what a process holds itself; pages of
mapped files count as its memory too while they are used, and the system takes them back when others need room.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import PACKAGES, provenance  # noqa: E402

CORES = 2
ROWS, MANY_ROWS, REPEATS = 25_000, 1_000_000, 3
MEMORY_KINDS = {"resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}


class MemoryPeak:
    """The largest growth of this process's memory, in MB by kind, sampled while the block runs."""

    def __enter__(self) -> MemoryPeak:
        self._stop = threading.Event()
        self._start = memory()
        self.growth = dict.fromkeys(MEMORY_KINDS, 0.0)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            for kind, value in memory().items():
                self.growth[kind] = max(self.growth[kind], value - self._start[kind])


def memory() -> dict[str, float]:
    """Return what this process has in memory, in MB by kind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(fields[name].split()[0]) / 1024 for kind, name in MEMORY_KINDS.items()}


def is_mapped(array: Any) -> bool:
    """Return whether an array lies in a mapped file, by the system's own list."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode = line.split()[:5]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return inode != "0"
    return False


def config(base: str) -> dict[str, Any]:
    """Return the quick start's config, on `base`."""
    return {
        "model_type": "llm",
        "base_model": base,
        "prompt": {"template": "### Instruction: {instruction}\n### Input: {input}\n### Response:\n"},
        "input_features": [{"name": "prompt", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "adapter": {"type": "lora"},
        "preprocessing": {"split": {"type": "random", "probabilities": [0.9, 0.05, 0.05]}},
        "trainer": {"type": "finetune", "epochs": 1, "batch_size": 8, "learning_rate": 1e-4},
        "backend": {"type": "local"},
    }


def write_rows(path: Path, rows: int) -> None:
    """Write the benchmark's CSV file."""
    import pandas as pd

    frame = pd.read_csv(ROOT / "datasets" / "stdlib_instructions.csv", keep_default_na=False).drop(columns="split")
    for start in range(0, rows, len(frame)):
        part = frame.head(rows - start).assign(instruction=frame["instruction"] + f" (version {start})")
        part.to_csv(path, mode="a", header=not start, index=False)


def write_base(folder: Path) -> None:
    """Write the shipped model with a beginning-of-sequence token, without which stock Ludwig does not tokenise."""
    shutil.copytree(ROOT / "ludwig_peft_plugin" / "assets" / "tiny-llama-python", folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|endoftext|>"}))


def preprocess(data: str, base: str, *, keep: bool) -> dict[str, Any]:
    """Return the seconds of `LudwigModel.preprocess`, and what it took in memory."""
    import logging

    from ludwig.api import LudwigModel

    model = LudwigModel(config(base), logging_level=logging.ERROR)
    with MemoryPeak() as peak:
        start, used = time.perf_counter(), time.process_time()
        sets = model.preprocess(dataset=data, skip_save_processed_input=not keep)
        seconds, processor = time.perf_counter() - start, time.process_time() - used
    result: dict[str, Any] = {"seconds": seconds, "processor_seconds": processor, "peak_growth_mb": peak.growth}
    datasets = [sets.training_set, sets.validation_set, sets.test_set]
    if hasattr(sets.training_set, "input_ids"):
        arrays = [a for data in datasets for a in (data.input_ids.values, data.input_ids.offsets, data.prompt_lengths)]
        result["rows"] = sum(map(len, datasets))
        result["tokens"] = sum(len(data.input_ids.values) for data in datasets)
        result["token_arrays_mb"] = {
            "in memory": sum(array.nbytes for array in arrays if not is_mapped(array)) / 2**20,
            "mapped": sum(array.nbytes for array in arrays if is_mapped(array)) / 2**20,
        }
    return result


def first_step(data: str, base: str, start: float, used: float) -> dict[str, Any]:
    """Return the seconds from `start` until preprocessing is done, and until the first step begins and ends.

    `used` is the processor's time at `start`.
    """
    import logging

    from ludwig.api import LudwigModel
    from ludwig.callbacks import Callback

    class Reached(Exception):
        pass

    seconds = {"registered": time.perf_counter() - start}

    class Clock(Callback):
        def on_preprocess_end(self, *args: object, **kwargs: object) -> None:
            seconds["preprocessed"] = time.perf_counter() - start

        def on_batch_start(self, *args: object, **kwargs: object) -> None:
            seconds["step begins"] = time.perf_counter() - start

        def on_batch_end(self, *args: object, **kwargs: object) -> None:
            seconds["step ends"] = time.perf_counter() - start
            raise Reached

    with tempfile.TemporaryDirectory() as output:
        try:
            LudwigModel(config(base), logging_level=logging.ERROR, callbacks=[Clock()]).train(
                dataset=data, output_directory=output
            )
        except Reached:
            return {"seconds": seconds, "processor_seconds": time.process_time() - used}
    raise RuntimeError("there was no step")


def measure(what: str, folder: Path) -> dict[str, Any]:
    """Run one measurement in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    import ludwig.api  # noqa: F401

    start, used = time.perf_counter(), time.process_time()
    if what != "stock":
        from ludwig_peft_plugin.register import register

        register()
    base = str(folder / "base")
    if what in ("first step", "again"):
        return first_step(str(folder / f"{ROWS}.csv"), base, start, used)
    rows = MANY_ROWS if what.startswith("million") else ROWS
    return preprocess(str(folder / f"{rows}.csv"), base, keep=rows == MANY_ROWS)


def run(what: str, folder: Path, cache: str) -> dict[str, Any]:
    """Run one measurement in a process of its own, with the given cache of kept tokens."""
    environment = {
        **os.environ,
        "LUDWIG_PEFT_PLUGIN": "0" if what == "stock" else "1",
        "LUDWIG_CACHE": str(folder / cache),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        # The step's threads wait for each other by spinning, which beside other work measures that other work.
        # Tokenizers have threads of their own.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--one", what, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    result: dict[str, Any] = json.loads(lines[-1][len("RESULT ") :])
    print(f"{what}: {json.dumps(rounded(result))}", flush=True)
    return result


def rounded(value: Any) -> Any:
    """Return numbers with two digits after the point."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def clock(result: dict[str, Any]) -> float:
    """Return the seconds by which measurements of the same thing are compared."""
    seconds: Any = result["seconds"]
    return float(seconds["step ends"] if isinstance(seconds, dict) else seconds)


def main() -> None:
    """Run every measurement and write what they gave."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "tokens.json"
    load = os.getloadavg()[0]
    short: dict[str, list[dict[str, Any]]] = {"stock": [], "plugin": [], "first step": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base")
        for rows in (ROWS, MANY_ROWS):
            write_rows(folder / f"{rows}.csv", rows)
        for repeat in range(REPEATS):
            for what, measured in short.items():
                measured.append(run(what, folder, f"cache {repeat}"))
        results = {what: min(measured, key=clock) for what, measured in short.items()}
        results |= {what: run(what, folder, "cache") for what in ("million", "million again")}
    record = {
        "what": f"{ROWS:,} and {MANY_ROWS:,} rows of the shipped data, tiny-llama-python, {CORES} cores",
        "measurements": rounded(results),
        "preprocessing_speedup": round(results["stock"]["seconds"] / results["plugin"]["seconds"], 2),
        "load_average_before": round(load, 1),
        **provenance((*PACKAGES, "tokenizers", "pandas", "pyarrow")),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    if "--one" in sys.argv:
        print("RESULT " + json.dumps(measure(sys.argv[2], Path(sys.argv[3]))), flush=True)
    else:
        main()
