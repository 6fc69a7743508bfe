"""Run the suites on one GPU, each run in a process of its own, and write one JSON.

usage: python benchmarks/gpu/run.py --suite 8b --suite 8b-plain --out OUT [--runs ours-lora-pack,unsloth-lora-pack]

`OUT/gpu.json` is written after every run, so a command that is killed keeps what it has measured; each run's log lies
in `OUT/logs`. `--merge FILE` starts from an earlier JSON: its runs stay unless they are run again. The checkpoints, of
random weights, are made on first use below `--models`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder, whose profile.py would stand in for Python's

from benchmarks.gpu.gates import failures  # noqa: E402
from benchmarks.gpu.job import PREPARED  # noqa: E402
from benchmarks.gpu.runs import OURS, SUITES, Run, select  # noqa: E402
from benchmarks.gpu.worker import GO, RESULT  # noqa: E402

ERROR_LINES = 6
SHORTEST_RUN = 20.0  # seconds; with less left of the budget no run is started
CORES_TO_OVERLAP = 8  # with fewer, the imports of the next run would slow the one that is measured


class Worker:
    """A started process of one run, waiting to be told to go."""

    def __init__(self, run: Run, models: Path, output: Path, device: str) -> None:
        self.run, self.output = run, output / "work" / run.key.replace("/", "-")
        self.log = output / "logs" / f"{run.key.replace('/', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        (self.output / RESULT).unlink(missing_ok=True)
        self._stream: IO[bytes] = self.log.open("wb")
        arguments = [json.dumps(run.as_dict()), str(models), str(self.output), device]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own: what it starts ends with it
        )

    def go(self) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which `result` reports
            self.process.stdin.write(f"{GO}\n".encode())
            self.process.stdin.close()

    def result(self, timeout: float) -> dict[str, Any]:
        """Wait for the end and return the record of the run: measured values, or what went wrong."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout)
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout:.0f} s"
        self.kill()
        record: dict[str, Any] = {"key": self.run.key, "setting": self.run.as_dict()}
        file = self.output / RESULT
        if status == "done" and file.is_file():
            record |= {"status": status, **json.loads(file.read_text(encoding="utf-8"))}
        else:
            record |= {"status": status if status != "done" else "ended without a result", "error": self._tail()}
        return {**record, "wall_s": round(time.monotonic() - started, 1)}

    def kill(self) -> None:
        """End the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._stream.close()

    def _tail(self) -> list[str]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line[-300:] for line in lines if line.strip()][-ERROR_LINES:]


def environment() -> dict[str, str]:
    """Return the environment of the workers: no hub, and the repository importable."""
    path = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": f"{path}{os.pathsep if path else ''}{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def main() -> None:
    """Run what the command line asks for."""
    options = _options()
    runs = select(options.suite, options.runs)
    if options.set:
        overrides = dict(options.set)
        runs = [_with(run, overrides=run.overrides | overrides) if run.tool == OURS else run for run in runs]
    if options.steps:
        runs = [_with(run, warm_up=options.warm_up or run.warm_up, steps=options.steps) for run in runs]
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    document = _document(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end too
    overlap = (os.cpu_count() or 1) >= CORES_TO_OVERLAP
    waiting = Worker(runs[0], options.models, options.out, options.device) if overlap else None
    try:
        document |= _prepare(options, list(dict.fromkeys(run.shape for run in runs)))
        for number, run in enumerate(runs):
            if (left := deadline - time.monotonic()) < SHORTEST_RUN:
                document["not_started"] = [run.key for run in runs[number:]]
                break
            worker = waiting or Worker(run, options.models, options.out, options.device)
            waiting = None
            worker.go()
            if overlap and number + 1 < len(runs):
                waiting = Worker(runs[number + 1], options.models, options.out, options.device)
            try:
                record = worker.result(min(run.timeout * options.patience, left))
            finally:
                worker.kill()
            document["runs"][run.key] = {**record, "call": document["call"]}
            _write(document, options.out / "gpu.json")
            print(line(record), flush=True)
    finally:
        if waiting is not None:
            waiting.kill()
        _write(document, options.out / "gpu.json")
    _print_verdicts(document, [run.key for run in runs])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure fine-tuning beside the peers, on one GPU.")
    parser.add_argument("--suite", action="append", required=True, choices=SUITES, help="may be given several times")
    parser.add_argument("--runs", type=lambda text: text.split(","), help="only these of the suites, in this order")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and the logs")
    parser.add_argument("--merge", type=Path, help="an earlier gpu.json to start from")
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"), help="folder for the checkpoints")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, help="timed steps, in place of each run's own")
    parser.add_argument("--warm-up", type=int, help="steps before them, with --steps")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of it")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on each run's timeout")
    parser.add_argument("--set", action="append", type=_assignment, help="trainer.compile=true: for our runs' config")
    options = parser.parse_args()
    options.out, options.models = options.out.resolve(), options.models.resolve()
    return options


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _with(run: Run, **changes: Any) -> Run:
    return Run(**{**run.as_dict(), **changes})


def _document(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of this call, with the runs of the one it continues."""
    earlier = json.loads(options.merge.read_text(encoding="utf-8"))["runs"] if options.merge else {}
    return {
        "call": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(["python", "benchmarks/gpu/run.py", *sys.argv[1:]]),
        "runs": earlier,
    }


def _prepare(options: argparse.Namespace, shapes: list[str]) -> dict[str, Any]:
    """Make checkpoints and rows in a process of its own, whose memory is free again when it ends.

    What it returns also says where the results come from (`provenance`): this process opens no GPU.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.prepare", str(options.models), options.device, *shapes],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREPARED)]
    if not lines:
        raise SystemExit(f"The checkpoints could not be made.\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    prepared: dict[str, Any] = json.loads(lines[-1][len(PREPARED) :])
    print(json.dumps(prepared), flush=True)
    return prepared


def _write(document: dict[str, Any], path: Path) -> None:
    for record in document["runs"].values():
        record["not_kept_because"] = failures(record, document["runs"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def line(record: dict[str, Any]) -> str:
    """Return a run's result in one line."""
    name = f"{record['key']:<28}"
    if record["status"] != "done":
        return f"{name} {record['status']} ({record['wall_s']:.0f} s): {' | '.join(record['error'])[-400:]}"
    values = [f"{record[key]:>10,.1f} {unit}" for key, unit in (("tok_s", "tok/s"), ("ms_step", "ms")) if key in record]
    values += [f"{record[key]:>7.2f} {unit}" for key, unit in (("peak_gib", "GiB"),) if key in record]
    if record.get("losses"):
        values.append(f"loss {record['losses'][0]:.3f} -> {record['losses'][-1]:.3f}")
    values += [f"{key[:-2]} {record[key]:.1f} s" for key in ("first_step_s", "compile_s", "wall_s") if key in record]
    return f"{name} {'  '.join(values)}"


def _print_verdicts(document: dict[str, Any], keys: list[str]) -> None:
    for key in keys:
        reasons = document["runs"].get(key, {}).get("not_kept_because", ["not started"])
        if reasons:
            print(f"not kept: {key}: {'; '.join(reasons)}", flush=True)


if __name__ == "__main__":
    main()
