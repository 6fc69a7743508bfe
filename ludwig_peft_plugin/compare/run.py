"""Run a comparison: each method once, one after the other, going on where an earlier call has stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ludwig_peft_plugin.compare.plan import Job
from ludwig_peft_plugin.compare.results import Result, failed, read_result, write_result
from ludwig_peft_plugin.compare.worker import JOB, SECONDS

LOG = "log.txt"
Runner = Callable[[Path], int]
"""Trains the job in a folder in a process of its own and returns its exit code."""


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    started: Callable[[Job], None] = lambda job: None,
    finished: Callable[[Job, Result, bool], None] = lambda job, result, earlier: None,
    runner: Runner | None = None,
) -> list[Result]:
    """Train what is not trained yet, and return every result in the order of `jobs`.

    A method whose result is there, made with the same settings, is not trained again; one that failed is; one that was
    interrupted goes on after its last checkpoint. A failure does not stop the others.

    Args:
        jobs: what to train.
        out: has or gets a folder for each method.
        started: called before a method is trained.
        finished: called with each result, and whether it was there already.
        runner: trains one; by default a new Python process.
    """
    train = runner or run_process
    results = []
    for job in jobs:
        folder = out / job.method
        earlier = read_result(folder)
        if earlier is not None and earlier.key == job.key and earlier.error is None:
            results.append(earlier)
            finished(job, earlier, True)
            continue
        started(job)
        _prepare(folder, job, keep=earlier is None)
        begun = time.monotonic()
        code = train(folder)
        result = read_result(folder)
        if result is None:
            text = f"the process ended with exit code {code} and no result; see {folder.name}/{LOG}"
            result = failed(job.method, job.key, text, time.monotonic() - begun)
            write_result(folder, result)
        results.append(result)
        finished(job, result, False)
    return results


def run_process(folder: Path) -> int:
    """Train the job in `folder` in a new Python process, its output in `log.txt`; return the exit code."""
    with open(folder / LOG, "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "ludwig_peft_plugin.compare.worker", str(folder)]
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _prepare(folder: Path, job: Job, *, keep: bool) -> None:
    """Write the job to its folder; what another job, or a failed run, has left there goes."""
    path = folder / JOB
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("key") == job.key
    if folder.is_dir() and not (same and keep):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"method": job.method, "key": job.key, "seed": job.seed, "config": job.config}
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    if not same:
        (folder / SECONDS).unlink(missing_ok=True)
