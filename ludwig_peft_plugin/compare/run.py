"""Run a comparison: each method once, one or several at a time, going on where an earlier call has stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from ludwig_peft_plugin.compare.plan import Job
from ludwig_peft_plugin.compare.results import Result, failed, finished_result, read_result, write_result
from ludwig_peft_plugin.compare.worker import JOB, SECONDS

LOG = "log.txt"
Runner = Callable[[Path], int]
"""Trains the job in a folder in a process of its own and returns its exit code."""


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    at_once: int = 1,
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
        at_once: how many are trained at the same time. The first is trained alone: the others read its tokens.
        started: called before a method is trained; never twice at the same time, nor beside `finished`.
        finished: called with each result, and whether it was there already.
        runner: trains one; by default a new Python process.
    """
    train, lock = runner or processes(at_once), threading.Lock()

    def result_of(job: Job) -> Result:
        folder = out / job.method
        result = finished_result(folder, job.key)
        earlier = result is not None
        if result is None:
            with lock:
                started(job)
            result = _trained(job, folder, train)
        with lock:
            finished(job, result, earlier)
        return result

    first = [result_of(job) for job in jobs[:1]]
    with ThreadPoolExecutor(at_once) as pool:
        return first + list(pool.map(result_of, jobs[1:]))


def _trained(job: Job, folder: Path, train: Runner) -> Result:
    _prepare(folder, job)
    begun = time.monotonic()
    code = train(folder)
    result = read_result(folder)
    if result is None:
        text = f"the process ended with exit code {code} and no result; see {folder.name}/{LOG}"
        result = failed(job.method, job.key, text, time.monotonic() - begun)
        write_result(folder, result)
    return result


def processes(at_once: int) -> Runner:
    """Return a runner that trains each job in a new Python process; `at_once` of them share the GPUs evenly."""
    import torch

    count = torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(count)]
    if at_once == 1 or count < 2:
        return run_process
    free: SimpleQueue[str] = SimpleQueue()
    for number in range(at_once):
        free.put(names[number % count])

    def runner(folder: Path) -> int:
        device = free.get()
        try:
            return run_process(folder, device)
        finally:
            free.put(device)

    return runner


def run_process(folder: Path, device: str | None = None) -> int:
    """Train the job in `folder` in a new Python process, its output in `log.txt`; return the exit code.

    Args:
        folder: of the job.
        device: the one GPU the process sees, as CUDA_VISIBLE_DEVICES names it; None for all that this one sees.
    """
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with open(folder / LOG, "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "ludwig_peft_plugin.compare.worker", str(folder)]
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment).returncode


def _prepare(folder: Path, job: Job) -> None:
    """Write the job to its folder; what another job, or a failed run, has left there goes."""
    path = folder / JOB
    same = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("key") == job.key
    if folder.is_dir() and not (same and read_result(folder) is None):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(job.as_dict(), indent=2, default=str) + "\n", encoding="utf-8")
    if not same:
        (folder / SECONDS).unlink(missing_ok=True)
