"""Write what a comparison came to: a table for people, the numbers as JSON, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ludwig_peft_plugin.compare.plan import BASE
from ludwig_peft_plugin.compare.results import Result, pareto_front

MARKDOWN, NUMBERS, PLOT = "report.md", "report.json", "report.svg"


def write_report(out: Path, results: Sequence[Result], title: str) -> list[Path]:
    """Write `report.md`, `report.json` and `report.svg` to `out`, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    front = pareto_front(results)
    values = {"title": title, "pareto_front": front, "results": [asdict(result) for result in results]}
    (out / NUMBERS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    written = [out / NUMBERS]
    if plot(out / PLOT, results, title):
        written.append(out / PLOT)
    (out / MARKDOWN).write_text(markdown(results, title, with_plot=len(written) > 1), encoding="utf-8")
    return [out / MARKDOWN, *written]


def markdown(results: Sequence[Result], title: str, *, with_plot: bool = True) -> str:
    """Return the report as Markdown: methods by loss, those that no other beats in bold, failures below."""
    front = pareto_front(results)
    done = sorted((result for result in results if result.error is None), key=_by_loss)
    device = next((result.device for result in done if result.device), "")
    lines = [
        f"# {title}",
        "",
        "| method | trained parameters | share | test loss | validation loss | at the end | peak memory | seconds |"
        " learning rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in done:
        name = f"**{result.method}**" if result.method in front else result.method
        lines.append(
            f"| {name} | {_count(result.trained)} | {_share(result)} | {_loss(result.test_loss)} | "
            f"{_loss(result.validation_loss)} | {_loss(result.final_validation_loss)} | {_size(result.peak_bytes)} | "
            f"{result.seconds:.0f} | {'-' if result.learning_rate is None else f'{result.learning_rate:g}'} |"
        )
    lines += [
        "",
        "Losses are in nats per target token, of the evaluation with the lowest validation loss; `at the end` is the "
        "validation loss of the last one. **Bold**: no other method has a lower loss with as few trained parameters. "
        f"`{BASE}` is the base, untrained. Memory is that of {_memory_of(device)}.",
    ]
    if with_plot:
        lines += ["", f"![loss over trained parameters]({PLOT})"]
    failures = [result for result in results if result.error is not None]
    if failures:
        lines += ["", "## Failed", ""]
        lines += [f"- `{result.method}`: {' '.join(str(result.error).split())}" for result in failures]
    return "\n".join(lines) + "\n"


def plot(path: Path, results: Sequence[Result], title: str) -> bool:
    """Draw loss over trained parameters with the Pareto front; False where matplotlib or results are missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    points = [result for result in results if result.loss is not None and result.trained]
    if not points:
        return False
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "ludwig-peft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        front = [result for name in pareto_front(points) for result in points if result.method == name]
        xs, ys = [float(result.trained or 0) for result in points], [float(result.loss or 0) for result in points]
        axes.scatter(xs, ys, color="#4c72b0", zorder=3)
        axes.step(
            [float(result.trained or 0) for result in front],
            [float(result.loss or 0) for result in front],
            where="post",
            color="#c44e52",
            label="Pareto front",
        )
        for result, x, y in zip(points, xs, ys, strict=True):
            weight = "bold" if result in front else "normal"
            axes.annotate(result.method, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, weight=weight)
        base = next((result.loss for result in results if result.method == BASE), None)
        if base is not None:
            axes.axhline(base, color="grey", linestyle="--", linewidth=1, label="base, untrained")
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("test loss (nats per token)" if points[0].test_loss is not None else "validation loss")
        axes.set_title(title)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
    return True


def _by_loss(result: Result) -> tuple[bool, float]:
    return result.loss is None, result.loss or 0.0


def _memory_of(device: str) -> str:
    return "the whole process, without a GPU" if device in ("", "cpu") else f"the GPU ({device})"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _share(result: Result) -> str:
    return f"{result.trained / result.total:.3%}" if result.trained is not None and result.total else "-"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"
