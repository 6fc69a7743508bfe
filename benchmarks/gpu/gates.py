"""When a measured number counts: the gradients were real, the loss fell, and the curve is that of the plain path."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

CURVE_TOLERANCE = 0.005
"""Largest relative difference between two loss curves, over windows of a fifteenth of the steps."""

WINDOWS = 15


def failures(run: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return why the numbers of `run` do not count; nothing where they do.

    Args:
        run: a record as `run.py` writes it.
        results: all records by key, among them the one `run` is to be compared with.
    """
    if run["status"] != "done":
        return [run["status"]]
    if run["setting"]["kind"] == "generate":
        return [] if run["tokens"] > 0 and math.isfinite(run["loss"]) else ["no answers, or a loss that is not finite"]
    reasons = []
    norms, losses = run["gradient_norms"], run["losses"]
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        reasons.append("a gradient norm is zero or not finite")
    if not losses or not all(math.isfinite(loss) for loss in losses):
        reasons.append("a loss is not finite")
    # The first steps of a run, which a plain path makes, are still warming up.
    elif run["setting"]["stop"] is None and not falls(losses):
        reasons.append("the loss does not fall")
    reference = run["setting"]["reference"]
    if reference is not None and not reasons:
        reasons += _compared(run, results.get(f"{run['setting']['shape']}/{reference}"), reference)
    return reasons


def _compared(run: Mapping[str, Any], other: Mapping[str, Any] | None, name: str) -> list[str]:
    if other is None or other["status"] != "done":
        return [f"not compared with {name}, which has no result"]
    difference = curve_difference(run["losses"], other["losses"])
    if difference <= CURVE_TOLERANCE:
        return []
    return [f"the loss differs from that of {name} by {difference:.2%}"]


def falls(losses: Sequence[float]) -> bool:
    """Return whether the mean of the last quarter is below that of the first."""
    quarter = max(1, len(losses) // 4)
    return statistics.mean(losses[-quarter:]) < statistics.mean(losses[:quarter])


def curve_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative difference between two curves over the steps both have, by windows' means.

    Windows of one step for short curves: the same rows in the same order give the same loss but for rounding.
    """
    steps = min(len(losses), len(reference))
    if steps == 0:
        return math.inf
    width = max(1, steps // WINDOWS)
    starts = range(0, steps, width)
    pairs = [
        (statistics.mean(losses[start : start + width]), statistics.mean(reference[start : start + width]))
        for start in starts
    ]
    differences = [abs(ours - theirs) / abs(theirs) if theirs else math.inf for ours, theirs in pairs]
    return max(differences) if all(math.isfinite(difference) for difference in differences) else math.inf
