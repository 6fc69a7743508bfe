"""`ludwig-peft compare`: read what is asked for, show progress, write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ludwig_peft_plugin.compare.plan import Job, chosen_methods, jobs, split_config
from ludwig_peft_plugin.compare.report import write_report
from ludwig_peft_plugin.compare.results import Result
from ludwig_peft_plugin.compare.run import run_jobs


def compare(
    config: dict[str, Any],
    methods: list[str],
    out: Path,
    *,
    title: str,
    overrides: dict[str, Any] | None = None,
    seed: int = 42,
    at_once: int = 1,
    console: Console,
) -> list[Result]:
    """Train the methods, write the report to `out` after each of them, and return the results.

    Args:
        config: a Ludwig config, which may have a `compare` section of overrides.
        methods: adapter types, or `all`.
        out: the report's folder, with a folder for each method; an earlier comparison there goes on.
        title: of the report.
        overrides: by method, in the place of those in the config's `compare` section.
        seed: of every run.
        at_once: how many are trained at the same time.
        console: where progress is shown.

    Raises:
        PluginError: a method or override is not known.
    """
    config, section = split_config(config)
    planned = jobs(config, chosen_methods(methods), {**section, **(overrides or {})}, seed=seed)
    made: list[Result] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(planned))

        def started(job: Job) -> None:
            progress.update(task, description=f"training {job.method}")

        def finished(job: Job, result: Result, earlier: bool) -> None:
            made.append(result)
            write_report(out, made, title)
            progress.advance(task)
            progress.console.print(_line(result, earlier), markup=False, highlight=False)

        return run_jobs(planned, out, at_once=at_once, started=started, finished=finished)


def _line(result: Result, earlier: bool) -> str:
    if result.error is not None:
        return f"{result.method}: failed: {result.error.splitlines()[0]}"
    loss = "-" if result.loss is None else f"{result.loss:.4f}"
    when = "done before" if earlier else f"{result.seconds:.0f} s"
    return f"{result.method}: loss {loss}, {result.trained or 0:,} parameters trained, {when}"
