"""Write docs/comparison.md and its chart from what learning_rates.py has measured.

usage: python benchmarks/methods_report.py [--check]      (--check only says whether the page is up to date)
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SOURCE = ROOT / "benchmarks" / "results" / "learning_rates.json"
PAGE = ROOT / "docs" / "comparison.md"
CHART = "comparison.svg"
LORA, FULL, MORE_OF_FULL = "lora, r ", "full", "full, higher rates"
WITHIN = 0.02


def defaults() -> dict[str, float]:
    """Return each type's learning rate in a config that gives none."""
    from ludwig.schema.llms.peft import adapter_registry

    from benchmarks.learning_rates import PLAIN_RATE
    from ludwig_peft_plugin.register import register

    register()
    return {kind: cls.learning_rate or PLAIN_RATE for kind, cls in adapter_registry.items()}


def measured(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs that have ended well, by label, lowest rate first; those of full fine-tuning together."""
    labels = {label: [run for run in runs if run["error"] is None] for label, runs in document["labels"].items()}
    labels[FULL] = labels.get(FULL, []) + labels.pop(MORE_OF_FULL, [])
    return {label: sorted(runs, key=lambda run: run["rate"] or 0) for label, runs in labels.items() if runs}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the lowest validation loss; test rows choose nothing."""
    return min(runs, key=lambda run: run["validation_loss"])


def ranks(labels: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return what LoRA of each rank comes to beside full fine-tuning, each at its best rate."""
    from benchmarks.learning_rates import VARIANTS

    full = best(labels[FULL])["test_loss"]
    by_rank = {VARIANTS[label][1]["r"]: best(runs) for label, runs in labels.items() if label.startswith(LORA)}
    parts = [f"rank {rank} {top['test_loss'] / full - 1:+.1%}" for rank, top in sorted(by_rank.items())]
    near = [rank for rank, top in sorted(by_rank.items()) if top["test_loss"] / full - 1 <= WITHIN]
    trained = f"{by_rank[near[0]]['trained'] / by_rank[near[0]]['total']:.0%}" if near else ""
    within = f"it is within {WITHIN:.0%} from rank {near[0]} on, {trained} of the parameters." if near else ""
    return [f"LoRA on all linear layers beside full fine-tuning, each at its best rate: {', '.join(parts)};", within]


def page(document: dict[str, Any], rates: dict[str, float]) -> str:
    """Return the page."""
    labels = measured(document)
    (base,) = labels.pop("base")
    lines = [
        "# All methods compared",
        "Every adapter type on the shipped model and instruction data: 3 epochs of 8 rows, AdamW, linear decay,",
        "one seed. A type has the options of a config that sets only `type`; its learning rate is the default, then",
        f"the best of those tried, chosen by validation loss. The base has a test loss of **{base['test_loss']:.4f}**.",
        "",
        *ranks(labels),
        "",
        f"![test loss over trained parameters]({CHART})",
        "",
        "| type | trained parameters | share | at the default rate | test loss | best rate tried | test loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, runs in sorted(labels.items(), key=lambda item: best(item[1])["test_loss"]):
        at_default = [run for run in runs if math.isclose(run["rate"], rates.get(label, 0.0))]
        shown = f"{at_default[0]['rate']:g} | {at_default[0]['test_loss']:.4f}" if at_default else "- | -"
        top = best(runs)
        name = f"[{label}](methods/{label}.md)" if label in rates else label
        lines.append(
            f"| {name} | {top['trained']:,} | {top['trained'] / top['total']:.2%} | {shown} | "
            f"{top['rate']:g} | {top['test_loss']:.4f} |"
        )
    lines += [
        "",
        "Losses are in nats per target token of 201 test rows. `bitfit` makes the biases that a Llama does not have.",
        "A tiny model, trained long on few rows, favours methods with many parameters and high rates more than a large",
        "one does, so a default also follows the method's paper and PEFT's comparison. Compare on your own data with",
        f"`ludwig-peft compare`. Not measured here: {', '.join(sorted(rates.keys() - labels.keys())) or 'none'}.",
        "",
        f"Measured on {document['device']} ({document['date']}, torch {document['versions']['torch']}, peft "
        f"{document['versions']['peft']}, commit {document['commit'][:12]})",
        "with `python benchmarks/learning_rates.py`; all rates and losses are in",
        "`benchmarks/results/learning_rates.json`.",
    ]
    return "\n".join(lines) + "\n"


def chart(document: dict[str, Any], path: Path) -> None:
    """Draw the best losses over trained parameters."""
    from ludwig_peft_plugin.compare.plan import BASE
    from ludwig_peft_plugin.compare.report import plot
    from ludwig_peft_plugin.compare.results import Result

    results = []
    for label, runs in measured(document).items():
        top = best(runs)
        trained = 0 if label == BASE else top["trained"]
        results.append(Result(label, "", trained, top["total"], top["validation_loss"], top["test_loss"]))
    plot(path, results, "every method at its best learning rate")


def main() -> int:
    """Write the page, or say whether it is up to date."""
    document = json.loads(SOURCE.read_text(encoding="utf-8"))
    text = page(document, defaults())
    if "--check" in sys.argv:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    chart(document, PAGE.with_name(CHART))
    return 0


if __name__ == "__main__":
    sys.exit(main())
