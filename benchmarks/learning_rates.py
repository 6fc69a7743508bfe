"""Train every adapter type with several learning rates on the shipped model, which its default is chosen from.

usage: python benchmarks/learning_rates.py OUT [--types lora,ia3] [--workers 12] [--seconds 500] [--config FILE]

Each type has the options a config has that sets only `type`, and the rates 1 and 3 times a power of ten within a factor
of ten of its default. Runs that OUT holds already are not repeated. Nothing is started after `--seconds`; the same
command goes on. `OUT/learning_rates.json` then has the losses of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any

import torch.multiprocessing as processes
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SPREAD = 10.0  # how far from the default rates are tried
PLAIN_RATE = 1e-3  # the default of a type that has none of its own: Ludwig's


def rates(default: float) -> list[float]:
    """Return the rates to try."""
    grid = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 3)]
    near = [rate for rate in grid if default / SPREAD <= rate * 1.0001 and rate <= 1.0001 * default * SPREAD]
    return sorted({*near, default})


def folder_of(out: Path, kind: str, rate: float) -> Path:
    """Return where a run lies."""
    return out / f"{kind}-{rate:g}"


def plan(out: Path, config: dict[str, Any], kinds: list[str]) -> list[Path]:
    """Write the jobs, and return the folders of those that have no result, the most likely rates first."""
    from ludwig.schema.llms.peft import adapter_registry

    from ludwig_peft_plugin.compare.plan import ALL, BASE, chosen_methods, jobs
    from ludwig_peft_plugin.compare.results import read_result
    from ludwig_peft_plugin.compare.worker import JOB

    planned = []
    for kind in chosen_methods(kinds or [ALL]):
        default = PLAIN_RATE if kind == BASE else adapter_registry[kind].learning_rate or PLAIN_RATE
        for rate in [default] if kind == BASE else rates(default):
            override = {} if kind == BASE else {"trainer": {"learning_rate": rate}}
            for job in jobs(config, [kind], {kind: override}):
                folder = folder_of(out, kind, rate)
                folder.mkdir(parents=True, exist_ok=True)
                values = {"method": kind, "key": job.key, "seed": job.seed, "config": job.config}
                (folder / JOB).write_text(json.dumps(values))
                result = read_result(folder)
                if result is None or result.key != job.key or result.error is not None:
                    planned.append((kind != BASE, abs(rate / default - 1), folder))
    return [folder for _, _, folder in sorted(planned)]


def work(waiting: Any, deadline: float) -> None:
    """Train runs until there are none or the time is over; a CUDA error ends the process, whose context is lost."""
    from ludwig_peft_plugin.compare.worker import run_job
    from ludwig_peft_plugin.register import register

    register()
    while time.time() < deadline:
        try:
            folder = Path(waiting.get_nowait())
        except queue.Empty:
            return
        started = time.time()
        try:
            result = run_job(folder)
            print(f"{folder.name}: {result.validation_loss:.4f} in {time.time() - started:.0f} s", flush=True)
        except Exception as error:
            print(f"{folder.name}: {error}", flush=True)
            if "CUDA" in str(error):
                os._exit(1)


def collect(out: Path) -> dict[str, Any]:
    """Return all results: for each type its rates with their losses, and the errors."""
    from ludwig_peft_plugin.compare.results import read_result
    from ludwig_peft_plugin.compare.worker import JOB

    types: dict[str, Any] = {}
    for folder in sorted(out.iterdir()):
        result = read_result(folder) if folder.is_dir() else None
        if result is not None:
            trainer = json.loads((folder / JOB).read_text())["config"]["trainer"]
            kept = {
                "rate": trainer.get("learning_rate"),
                "validation_loss": result.validation_loss,
                "test_loss": result.test_loss,
                "final_validation_loss": result.final_validation_loss,
                "trained": result.trained,
                "error": result.error,
            }
            types.setdefault(result.method, []).append(kept)
    return types


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "methods.yaml")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    from benchmarks.record import provenance
    from ludwig_peft_plugin.register import register

    register()
    config = yaml.safe_load(options.config.read_text())
    config["dataset"] = str((options.config.parent / config["dataset"]).resolve())
    config.pop("adapter", None)
    config["trainer"].pop("learning_rate", None)
    options.out.mkdir(parents=True, exist_ok=True)
    folders = plan(options.out, config, [kind for kind in options.types.split(",") if kind])
    print(f"{len(folders)} runs", flush=True)
    context = processes.get_context("spawn")
    waiting = context.Queue()
    for folder in folders:
        waiting.put(str(folder))
    time.sleep(0.5)  # the queue is filled by a thread of its own
    running: list[Any] = []
    while time.time() < deadline and not (waiting.empty() and not running):
        running = [process for process in running if process.is_alive()]
        while len(running) < options.workers and not waiting.empty():
            running.append(context.Process(target=work, args=(waiting, deadline)))
            running[-1].start()
        time.sleep(1)
    for process in running:
        process.join()
    waiting.cancel_join_thread()
    document = {**provenance(), "config": options.config.name, "types": collect(options.out)}
    (options.out / "learning_rates.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
