"""Train every adapter type with several learning rates on the shipped model and data, and compare them all.

usage: python benchmarks/learning_rates.py OUT [--only lora,ia3] [--workers 12] [--seconds 500]

A type has the options of a config that sets only `type` (and what it cannot do without), and the rates 1 and 3 times a
power of ten up to a factor of about three from its default. Runs that OUT holds already are not repeated, nothing is
started after `--seconds`, and the same command goes on; it writes OUT/learning_rates.json. `methods_report.py` makes
the page in the docs of it. On a GPU many runs share it, so their seconds say little and are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.multiprocessing as processes
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = ROOT / "benchmarks" / "methods.yaml"
SPREAD = 10 / 3  # how far from the default rates are tried
PLAIN_RATE = 1e-3  # the default of a type that has none of its own: Ludwig's
NEEDED: dict[str, dict[str, Any]] = {
    "bitfit": {"create": True},  # a Llama has no biases
    "multitask_prompt_tuning": {"task_column": "task", "num_tasks": 2, "tasks": ["function", "method"]},
}
"""Options without which a type does not train this model on these rows."""


def _wide(rank: int) -> dict[str, Any]:
    return {"r": rank, "alpha": rank, "dropout": 0.0, "target_modules": "all-linear"}


VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "lora, r 16, all-linear": ("lora", {"r": 16, "target_modules": "all-linear"}, (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)),
    **{f"lora, r {rank}, all-linear": ("lora", _wide(rank), (3e-4, 5e-4, 7e-4, 1e-3, 2e-3)) for rank in (32, 64, 128)},
    "full, higher rates": ("full", {}, (2e-4, 3e-4, 5e-4, 1e-3)),
}
"""What is compared besides: a type, its options and the rates."""


def rates(default: float) -> list[float]:
    """Return the rates to try."""
    grid = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 3)]
    near = [rate for rate in grid if default / SPREAD <= rate * 1.0001 and rate <= 1.0001 * default * SPREAD]
    return sorted({*near, default})


def settings(only: list[str]) -> list[tuple[str, str, dict[str, Any], float | None, float]]:
    """Return label, type, options, rate and distance from the default of every run."""
    from ludwig.schema.llms.peft import adapter_registry

    found: list[tuple[str, str, dict[str, Any], float | None, float]] = [("base", "base", {}, None, 0.0)]
    for kind, cls in adapter_registry.items():
        default = cls.learning_rate or PLAIN_RATE
        found += [(kind, kind, NEEDED.get(kind, {}), rate, abs(rate / default - 1)) for rate in rates(default)]
    for label, (kind, options, tried) in VARIANTS.items():
        found += [(label, kind, options, rate, 0.5) for rate in tried]
    return [setting for setting in found if not only or setting[0] in only]


def plan(out: Path, config: dict[str, Any], only: list[str]) -> list[Path]:
    """Write the jobs, and return the folders of those that have no result, the defaults first."""
    from ludwig_peft_plugin.compare.plan import jobs
    from ludwig_peft_plugin.compare.results import finished_result
    from ludwig_peft_plugin.compare.worker import JOB

    planned = []
    for label, kind, options, rate, distance in settings(only):
        override = {} if rate is None else {**options, "trainer": {"learning_rate": rate}}
        (job,) = jobs(config, [kind], {kind: override} if override else {})
        if "task_column" in options:
            job.config["dataset"] = str(with_tasks(Path(config["dataset"]), out))
        folder = out / (f"{label}-{rate:g}" if rate is not None else label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps({**job.as_dict(), "label": label}))
        if finished_result(folder, job.key) is None:
            planned.append((distance, folder))
    return [folder for _, folder in sorted(planned)]


def with_tasks(dataset: Path, out: Path) -> Path:
    """Write the rows with a column that tells methods of classes from functions, for what is trained on tasks."""
    path = out / "rows_with_tasks.csv"
    if not path.exists():
        rows = pd.read_csv(dataset, keep_default_na=False)
        rows.assign(task=rows["output"].str.contains(r"\bself\b").map({True: "method", False: "function"})).to_csv(
            path, index=False
        )
    return path


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
        except Exception as error:  # it is in the run's result, too
            print(f"{folder.name}: {error}", flush=True)
            if "CUDA" in str(error):
                os._exit(1)
        gc.collect()
        torch.cuda.empty_cache()


def collect(out: Path) -> dict[str, Any]:
    """Return all results by label: rates with their losses, or the error."""
    from ludwig_peft_plugin.compare.results import read_result
    from ludwig_peft_plugin.compare.worker import JOB

    labels: dict[str, Any] = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        result = read_result(folder)
        if result is not None:
            job = json.loads((folder / JOB).read_text())
            kept = {
                "rate": job["config"]["trainer"].get("learning_rate"),
                "validation_loss": result.validation_loss,
                "test_loss": result.test_loss,
                "final_validation_loss": result.final_validation_loss,
                "trained": result.trained,
                "total": result.total,
                "steps": result.steps,
                "error": result.error,
            }
            labels.setdefault(job.get("label", result.method), []).append(kept)
    return labels


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="labels, with semicolons between them")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6)
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    from benchmarks.record import provenance
    from ludwig_peft_plugin.register import register

    register()
    config = yaml.safe_load(CONFIG.read_text())
    config["dataset"] = str((CONFIG.parent / config["dataset"]).resolve())
    config.pop("adapter", None)
    config["trainer"].pop("learning_rate", None)
    options.out.mkdir(parents=True, exist_ok=True)
    folders = plan(options.out, config, [label for label in options.only.split(";") if label])
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
    document = {**provenance(), "config": CONFIG.name, "labels": collect(options.out)}
    (options.out / "learning_rates.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
