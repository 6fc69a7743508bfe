"""Turn `benchmarks/results/*.json` into the tables of README.md and docs/performance.md, and the chart.

usage: python benchmarks/report.py           writes them, between the lines `<!-- benchmarks:begin -->` and `:end`
       python benchmarks/report.py --check   writes nothing; fails if they are not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu.gates import curve_difference  # noqa: E402
from benchmarks.gpu.results import Record, Results  # noqa: E402
from benchmarks.gpu.shapes import SHAPES  # noqa: E402
from benchmarks.targets import CHART, CURVES, PEAK_GIB, TARGETS, TOK_S, UNITS, Target, label  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README, PAGE, PICTURE = Path("README.md"), Path("docs/performance.md"), Path("docs/performance.svg")
ELSEWHERE = " †"
COLOURS = {"this plugin": "#1f6feb", "Unsloth": "#8b949e", "TRL + Liger": "#b1bac4", "stock Ludwig": "#d0d7de"}


def number(value: float, metric: str) -> str:
    """Return a value with its unit: `19,123 tok/s`, `38.20 GiB`."""
    text = f"{value:,.0f}" if metric == TOK_S else f"{value:,.2f}"
    return f"{text} {UNITS[metric]}"


def beside(results: Results, target: Target, ours: Record) -> str:
    """Return the peers of a target: value, and how many times ours it is."""
    texts = []
    for key in target.peers:
        peer = results.get(key, ours["call"])
        if peer is None:
            texts.append(f"{label(key)}: no result")
            continue
        factor = ours[target.metric] / peer[target.metric]
        mark = "" if peer["call"] == ours["call"] else ELSEWHERE
        texts.append(f"{label(key)} {number(peer[target.metric], target.metric)} ({factor:.2f}x){mark}")
    return "<br>".join(texts) or "-"


def goal(target: Target) -> str:
    """Return what is to be reached, in words."""
    sign = "≥" if target.more_is_better else "≤"
    parts = [] if target.goal is None else [f"{sign} {target.goal:,g} {UNITS[target.metric]}"]
    for key, factor in target.ratios:
        name = "our LoRA" if key == "8b/ours-lora-pack" else label(key)
        parts.append(f"{sign} {factor:g}x {name}")
    return ", ".join(parts)


def reached(results: Results, target: Target, ours: Record) -> bool:
    """Return whether the value and all ratios are reached."""
    value = ours[target.metric]

    def good(measured: float, wanted: float) -> bool:
        return measured >= wanted if target.more_is_better else measured <= wanted

    others = [(results.get(key, ours["call"]), factor) for key, factor in target.ratios]
    ratios = [other is not None and good(value / other[target.metric], factor) for other, factor in others]
    return all(ratios) and (target.goal is None or good(value, target.goal))


def target_rows(results: Results) -> list[list[str]]:
    """Return the rows of the targets' table: run, measured, goal, reached, beside."""
    rows = []
    for target in TARGETS:
        ours = results.beside(target.run, target.peers)
        if ours is None:
            rows.append([target.title, "not measured", goal(target), "-", "-"])
            continue
        value = f"**{number(ours[target.metric], target.metric)}**"
        mark = "yes" if reached(results, target, ours) else "no"
        rows.append([target.title, value, goal(target), mark, beside(results, target, ours)])
    return rows


def curve_lines(results: Results) -> list[str]:
    """Return what is known of the float8 curves."""
    lines = []
    for title, low, full in CURVES:
        float8, bfloat16 = results.newest(low), results.newest(full)
        if float8 is None or bfloat16 is None:
            continue
        lines.append(
            f"- float8 base, {title}: over {len(float8['losses'])} steps the loss differs from that of bfloat16 by "
            f"{_differences(float8, bfloat16)} (means of {max(1, len(float8['losses']) // 15)} "
            f"steps; last: {float8['losses'][-1]:.4f} and {bfloat16['losses'][-1]:.4f})."
        )
        control = results.newest(f"{full}-control")
        if control is not None:
            lines.append(
                "  Two bfloat16 runs whose attention rounds differently (flash attention instead of the kernel for "
                f"short sequences) differ by {_differences(control, bfloat16)}: so much is not float8's."
            )
    return lines


def _differences(run: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return how far one loss curve is from another, on average and in the worst window."""
    mean = sum(run["losses"]) / sum(other["losses"]) - 1
    return f"{mean:+.2%} on average and by at most {curve_difference(run['losses'], other['losses']):.2%}"


def run_rows(results: Results) -> list[list[str]]:
    """Return the newest record of every run, as a row; runs that do not count say why."""
    rows = []
    for key in dict.fromkeys(record["key"] for record in sorted(results.records, key=lambda record: record["key"])):
        record = results.get(key) or next(record for record in results.records if record["key"] == key)
        reasons = results.why_not(record)
        if reasons:
            rows.append([f"`{key}`", f"not kept: {'; '.join(reasons)}", "", "", "", "", ""])
            continue
        shape, limit = SHAPES.get(record["setting"]["shape"]), ""
        if shape is not None and results.matmul_flops is not None and record["setting"]["kind"] == "train":
            limit = f"{record[TOK_S] / shape.limit(results.matmul_flops):.0%}" if TOK_S in record else ""
        forms = {"ms_step": "{:,.1f}", PEAK_GIB: "{:.2f}", "first_step_s": "{:.1f}"}
        cells = [form.format(record[name]) if name in record else "" for name, form in forms.items()]
        speed = f"{record[TOK_S]:,.0f}" if TOK_S in record else "not timed"
        rows.append([f"`{key}`", speed, limit, *cells, record["call"]])
    return rows


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def cpu_lines(folder: Path = RESULTS) -> list[str]:
    """Return the results on a CPU."""
    quick = json.loads((folder / "cpu_quickstart.json").read_text(encoding="utf-8"))
    memory = json.loads((folder / "cpu_memory.json").read_text(encoding="utf-8"))
    rows = [
        [f"`configs/{name}.yaml`", f"{values['peak_gib']:.2f} GiB", f"{values['test_loss']:.4f}"]
        for name, values in memory["results"].items()
    ]
    return [
        f"{quick['device']}, {quick['what']}: stock Ludwig's steps take {quick['speedup']:.2f} times as long as the "
        f"plugin's ({quick['date']}).",
        "",
        *table(["quick start", "peak memory of the process", "test loss"], rows),
    ]


def readme_section(results: Results) -> str:
    """Return the README's part: the targets' table without what is not measured, and the chart."""
    if not results.documents:
        return "No GPU results are recorded yet.\n"
    rows = [[row[0], row[1], row[4]] for row in target_rows(results) if row[1] != "not measured"]
    newest = results.documents[0]
    lines = table(["one " + newest["device"], "this plugin", "others, same rows"], rows)
    lines += ["", _footnote(rows), f"How it is measured, and every run: [{PAGE}]({PAGE})."]
    if chart_values(results):
        lines += ["", f"![Tokens a second beside the peers]({PICTURE})"]
    return "\n".join(line for line in lines if line is not None) + "\n"


def page_section(results: Results, folder: Path = RESULTS) -> str:
    """Return the generated part of docs/performance.md."""
    lines = ["## Results on a GPU", ""]
    if results.documents:
        newest = results.documents[0]
        versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
        lines += [f"{newest['device']}; {versions}. Last call: {newest['date']}.", ""]
        rows = target_rows(results)
        lines += [*table(["run", "measured", "goal", "reached", "others, same rows"], rows), ""]
        lines += [_footnote(rows), *curve_lines(results), ""]
        if chart_values(results):
            lines += [f"![Tokens a second beside the peers]({PICTURE.name})", ""]
        if results.matmul_flops is not None:
            lines += [f"Matrix products of random bfloat16 numbers: {results.matmul_flops / 1e12:.0f} TFLOP/s.", ""]
        head = ["run", "tok/s", "of the limit", "ms a step", "peak GiB", "seconds to the first step", "call"]
        lines += ["### Every run", "", *table(head, run_rows(results)), ""]
    else:
        lines += ["None are recorded yet.", ""]
    lines += ["## Results on a CPU", "", *cpu_lines(folder)]
    return "\n".join(lines) + "\n"


def _footnote(rows: list[list[str]]) -> str:
    if any(ELSEWHERE in cell for row in rows for cell in row):
        return f"{ELSEWHERE.strip()} measured in another call of the same command.\n"
    return ""


def chart_values(results: Results) -> list[tuple[str, str, float]]:
    """Return the bars of the chart: group, whose, tokens a second."""
    bars = []
    for group, keys in CHART:
        ours = results.beside(keys[0], keys[1:])
        if ours is None:
            continue
        for key in keys:
            record = results.get(key, ours["call"])
            if record is not None:
                bars.append((group, label(key), record[TOK_S]))
    return bars


def draw(bars: list[tuple[str, str, float]], path: Path) -> None:
    """Draw the chart as an SVG that is the same for the same values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(bars) + 0.9))
    places, place, previous = [], 0.0, None
    for group, _, _ in bars:
        place += 1.0 if previous in (None, group) else 1.6
        places.append(place)
        previous = group
    axes.barh(places, [value for _, _, value in bars], color=[COLOURS[name] for _, name, _ in bars])
    for at, (_, _, value) in zip(places, bars, strict=True):
        axes.annotate(f" {value:,.0f}", (value, at), va="center")
    names = [f"{group}: {name}".replace("\n", " ") for group, name, _ in bars]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second, padding not counted")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Description": json.dumps(bars)})
    plt.close(figure)


def replaced(text: str, section: str, name: str) -> str:
    """Return `text` with `section` between the markers.

    Raises:
        ValueError: the markers are not there, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or BEGIN in old:
        raise ValueError(f"{name} needs the lines {BEGIN} and {END}, once and in this order")
    return f"{before}{BEGIN}\n{section.rstrip()}\n{END}{after}"


def outdated(root: Path = ROOT) -> list[str]:
    """Return the files that are not what the results say."""
    results = Results(root / RESULTS.relative_to(ROOT))
    stale = []
    for path, section in _sections(results, root).items():
        text = (root / path).read_text(encoding="utf-8")
        if replaced(text, section, str(path)) != text:
            stale.append(str(path))
    bars = chart_values(results)
    picture = root / PICTURE
    if bars and (not picture.is_file() or _described(bars) not in picture.read_text(encoding="utf-8")):
        stale.append(str(PICTURE))
    return stale


def _described(bars: list[tuple[str, str, float]]) -> str:
    from xml.sax.saxutils import escape

    return escape(json.dumps(bars))


def _sections(results: Results, root: Path) -> dict[Path, str]:
    folder = root / RESULTS.relative_to(ROOT)
    return {README: readme_section(results), PAGE: page_section(results, folder)}


def write(root: Path = ROOT) -> None:
    """Write both sections and the chart."""
    results = Results(root / RESULTS.relative_to(ROOT))
    for path, section in _sections(results, root).items():
        text = (root / path).read_text(encoding="utf-8")
        (root / path).write_text(replaced(text, section, str(path)), encoding="utf-8")
    if bars := chart_values(results):
        draw(bars, root / PICTURE)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if stale := outdated():
            raise SystemExit(f"not what benchmarks/results says: {', '.join(stale)}; run python benchmarks/report.py")
    else:
        write()
