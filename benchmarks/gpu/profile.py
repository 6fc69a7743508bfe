"""Profile a few steady steps of one of our runs: stage table, top kernels, waits for the device, and a trace.

usage: python benchmarks/gpu/profile.py --run 8b/ours-lora-pack --out OUT [--trace]

Writes `OUT/profile-<shape>-<run>.json` and `.md`; `--trace` adds a Chrome trace (`.trace.json.gz`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, in which this file would stand in for Python's `profile`

from torch.autograd import DeviceType  # noqa: E402

from benchmarks.gpu import run_ours  # noqa: E402
from benchmarks.gpu.job import Job  # noqa: E402
from benchmarks.gpu.prepare import prepare  # noqa: E402
from benchmarks.gpu.runs import OURS, SEED, SUITES, Run  # noqa: E402

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TO_HOST = "Memcpy DtoH"
STAGE_RANGE = "stage: "  # how stages.py names its ranges
KERNELS = 25


def profile(job: Job, timed: int, profiled: int, trace: Path | None) -> dict[str, Any]:
    """Train and return the stage table (milliseconds a step), the kernels by time, and the waits a step."""
    from ludwig.api import LudwigModel

    from benchmarks.gpu.ludwig_run import NOT_SAVED
    from benchmarks.gpu.stages import StageClock

    cuda = job.device == "cuda"
    clock = StageClock(job.run.warm_up, timed, profiled, cuda)
    model = LudwigModel(run_ours.config(job), logging_level=logging.WARNING, callbacks=[clock])
    model.train(
        dataset=str(job.rows), output_directory=str(job.output), random_seed=SEED, **dict.fromkeys(NOT_SAVED, True)
    )
    if trace is not None:
        clock.profiler.export_chrome_trace(str(trace))
    counts = wait_counts(clock.profiler.events(), profiled)
    kernels = top_kernels(clock.profiler.key_averages(), profiled, cuda)
    busy = sum(kernel["ms_step"] for kernel in kernels)
    milliseconds = 1000 * clock.seconds / timed
    return {
        "run": job.run.key,
        "setting": job.run.as_dict(),
        "ms_step": round(milliseconds, 3),
        "stages": clock.stages.milliseconds(timed),
        "kernel_ms_step": round(busy, 3),
        "device_busy": round(busy / milliseconds, 4) if cuda else None,
        "waits_a_step": counts,
        "kernels": kernels[:KERNELS],
    }


def wait_counts(events: Any, steps: int) -> dict[str, float]:
    """Return how often a step waits for the device, and copies to the host, while the stages are running."""
    # A range is shown on the device as well, where it ends later than on the host.
    ranges = [e for e in events if e.name.startswith(STAGE_RANGE) and e.device_type == DeviceType.CPU]
    end = max(event.time_range.end for event in ranges)
    names = [event.name for event in events if event.time_range.start < end]
    counts = {name: sum(other == name for other in names) for name in WAITS}
    counts[TO_HOST] = sum(name.startswith(TO_HOST) for name in names)
    return {name: count / steps for name, count in counts.items()}


def top_kernels(averages: Any, steps: int, cuda: bool) -> list[dict[str, Any]]:
    """Return what runs on the device (on a CPU: the operators), longest first, milliseconds and calls a step."""
    work = [event for event in averages if not event.is_user_annotation]
    if cuda:
        on_device = [event for event in work if event.device_type == DeviceType.CUDA]
        rows = [(event.key, event.self_device_time_total, event.count) for event in on_device]
    else:
        rows = [(event.key, event.self_cpu_time_total, event.count) for event in work]
    rows.sort(key=lambda row: -row[1])
    return [{"name": name, "ms_step": time / 1000 / steps, "calls_step": count / steps} for name, time, count in rows]


def markdown(result: dict[str, Any]) -> str:
    """Return the stage table and the kernels as Markdown."""
    total = result["ms_step"]
    lines = [f"# {result['run']}: {total:.1f} ms a step", "", "| stage | host ms | device ms | of the step |"]
    lines.append("|---|---|---|---|")
    for stage, row in result["stages"].items():
        share = row["device_ms"] / total
        lines.append(f"| {stage} | {row['host_ms']:.2f} | {row['device_ms']:.2f} | {share:.1%} |")
    waits = ", ".join(f"{name} {count:g}" for name, count in result["waits_a_step"].items())
    busy = result["device_busy"]
    lines += ["", f"A step waits: {waits}." + ("" if busy is None else f" Kernels run for {busy:.1%} of the time."), ""]
    lines += ["| kernel | ms a step | calls a step |", "|---|---|---|"]
    for kernel in result["kernels"]:
        name = kernel["name"].replace("|", "\\|")[:110]
        lines.append(f"| `{name}` | {kernel['ms_step']:.3f} | {kernel['calls_step']:g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Profile what the command line asks for."""
    parser = argparse.ArgumentParser(description="Profile one of our runs.")
    parser.add_argument("--run", required=True, help="shape/name, as in runs.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--timed", type=int, default=8, help="steps of the stage table")
    parser.add_argument("--profiled", type=int, default=4, help="steps under the profiler")
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace too")
    options = parser.parse_args()
    options.out, options.models = options.out.resolve(), options.models.resolve()
    runs: dict[str, Run] = {run.key: run for suite in SUITES.values() for run in suite if run.tool == OURS}
    if options.run not in runs:
        parser.error(f"--run: there are {', '.join(runs)}")
    # One step more, so that the profiler's last step is followed by the loop as any other.
    run = replace(runs[options.run], steps=options.timed + options.profiled + 1)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options.models, options.device, [run.shape])
    run_ours.prepare(run.tool)
    name = f"profile-{run.key.replace('/', '-')}"
    trace = options.out / f"{name}.trace.json.gz" if options.trace else None
    job = Job(run, options.models, options.out / "work", options.device)
    result = profile(job, options.timed, options.profiled, trace)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
