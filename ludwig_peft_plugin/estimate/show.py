"""Print a report as a table and a few lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ludwig_peft_plugin.estimate.batch import BatchPlan
from ludwig_peft_plugin.estimate.gpu import gib
from ludwig_peft_plugin.estimate.memory import CUDA_CONTEXT
from ludwig_peft_plugin.estimate.report import Report

SHOWN_SUGGESTIONS = 8


def show(report: Report, name: str, console: Console) -> None:
    """Print `report` on the config called `name`."""
    console.print(_table(report, name))
    for line in _lines(report):
        console.print(line, markup=False, highlight=False)
    if report.suggestions:
        console.print(_suggestions(report))
    if report.together is not None:
        changes, needed = report.together
        console.print(f"Fits with {'; '.join(changes)}: {gib(needed)} GiB.", markup=False, highlight=False)


def batch_text(plan: BatchPlan, size: int) -> str:
    """Return a batch in the words of the config."""
    return f"{plan.option}: {size}"


def _table(report: Report, name: str) -> Table:
    estimate = report.estimate
    table = Table(title=f"GPU memory of training {name}")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    for part, size in sorted(estimate.at_peak.items(), key=lambda entry: -entry[1]):
        if size:
            table.add_row(part, gib(size), f"{size / estimate.peak:.1%}")
    table.add_section()
    table.add_row("peak (max_memory_allocated)", gib(estimate.peak), "100.0%", style="bold")
    table.add_row("gaps in the allocator, assumed", gib(estimate.slack), "")
    table.add_row("CUDA context, assumed", gib(CUDA_CONTEXT), "")
    table.add_row("needed", gib(estimate.needed), "", style="bold")
    return table


def _lines(report: Report) -> list[str]:
    estimate, plan = report.estimate, report.plan
    count, shape = estimate.parameters, estimate.shape
    where = f"the adapters {', '.join(report.adapters)}" if report.adapters else "the adapter"
    lines = [
        f"Parameters: {count.base + count.adapter:,}, of which {count.adapter:,} in {where}; {count.trained:,} "
        f"are trained ({count.trained / (count.base + count.adapter):.2%}).",
        f"Micro-batch: {batch_text(plan, report.size)}, {shape.tokens:,} tokens in rows of up to {plan.row_tokens:,} "
        f"({plan.limit}); {plan.target_share:.0%} of them carry loss.",
    ]
    if estimate.obstacle is not None:
        lines.append(
            f"Activations come from a closed formula, good to about a third: this model does not run on the meta "
            f"device ({estimate.obstacle})."
        )
    if estimate.paged:
        lines.append(f"Paged optimiser state, on the host when the GPU is full: {gib(estimate.paged)} GiB.")
    if report.gpu is None:
        return lines
    verdict = "fits" if report.fits else "does not fit"
    lines.append(f"GPU: {gib(report.gpu)} GiB; the config {verdict} ({gib(estimate.needed)} GiB needed).")
    if report.largest:
        lines.append(f"Largest batch that fits: {batch_text(plan, report.largest)}.")
    else:
        lines.append("Not even the smallest batch fits.")
    return lines


def _suggestions(report: Report) -> Table:
    table = Table(title="What would lower it, each by itself")
    table.add_column("setting", overflow="fold")
    table.add_column("saves GiB", justify="right")
    table.add_column("then GiB", justify="right")
    table.add_column("cost")
    for entry in report.suggestions[:SHOWN_SUGGESTIONS]:
        table.add_row(entry.change.text, gib(entry.saves), gib(entry.needed), entry.change.cost)
    return table
