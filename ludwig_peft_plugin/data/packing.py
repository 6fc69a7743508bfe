"""Which rows go through the model together: a fixed number of rows, as many as fit some tokens, or packed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ludwig_peft_plugin.errors import DataError

GROUPS_PER_WINDOW = 64
SPARE = 0.03  # share of a window's tokens that no group is opened for: with rows left to choose from, gaps close better


@dataclass(frozen=True)
class Plan:
    """Groups of rows; each is one micro-batch.

    Attributes:
        rows: indices of the dataset's rows, each once, group after group, shape (n,), int64.
        starts: where each group starts in `rows` and the last one ends, shape (groups + 1,), int64.
    """

    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]]) -> Plan:
        """Return the plan with these groups."""
        sizes = np.fromiter((len(group) for group in groups), np.int64, len(groups))
        rows = np.fromiter((row for group in groups for row in group), np.int64, int(sizes.sum()))
        return cls(rows, np.append(0, np.cumsum(sizes)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the rows of group `index`, shape (B,)."""
        return self.rows[self.starts[index] : self.starts[index + 1]]


def token_capacity(
    lengths: np.ndarray, tokens: int | None, packing: bool, batch_size: int, limit: int | None
) -> int | None:
    """Return how many tokens a micro-batch holds at most; None where it holds a fixed number of rows.

    Args:
        lengths: tokens of each row of the dataset that the model reads, shape (n,).
        tokens: trainer.tokens_per_batch.
        packing: trainer.packing. Without `tokens`, a micro-batch is then as long as `batch_size` rows of the longest
            length there can be: `limit`, or without one the longest row of the data.
        batch_size: trainer.batch_size.
        limit: preprocessing.global_max_sequence_length.

    Raises:
        DataError: a row is longer than a micro-batch may be.
    """
    if tokens is None and not packing:
        return None
    longest = int(lengths.argmax()) if len(lengths) else 0
    needed = int(lengths[longest]) if len(lengths) else 1
    capacity = tokens if tokens is not None else batch_size * (limit or needed)
    if needed <= capacity:
        return capacity
    if tokens is not None:
        option, remedy = f"trainer.tokens_per_batch: {tokens}", f"give at least {needed}"
    else:
        option = f"trainer.packing: batch_size x preprocessing.global_max_sequence_length is {capacity} tokens, which"
        remedy = f"give trainer.tokens_per_batch: {needed} or more"
    raise DataError(
        f"{option} is less than the longest row needs: the model reads {needed} tokens of row {longest} of the "
        "training data (all but the last, which is only predicted), and rows are never cut to fit. "
        f"Either {remedy}, or shorten rows with preprocessing.global_max_sequence_length."
    )


def by_count(order: np.ndarray, size: int) -> Plan:
    """Return groups of `size` rows in the given order; the last one may be smaller."""
    return Plan(order, np.append(np.arange(0, len(order), size), len(order)))


def by_tokens(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Plan:
    """Return groups of as many rows as fit into `capacity` tokens, in the given order.

    Args:
        lengths: tokens of each row of the dataset, none more than `capacity`, shape (n,).
        order: the rows to group, in order, shape (m,).
        capacity: tokens of a group at most.
    """
    starts, filled = [], capacity
    for place, length in enumerate(lengths[order].tolist()):
        filled += length
        if filled > capacity or place == 0:
            starts.append(place)
            filled = length
    return Plan(order, np.array([*starts, len(order)], dtype=np.int64))


def by_best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Plan:
    """Return groups that fill `capacity` tokens as far as whole rows can: best fit, longest rows first.

    Rows are taken in the given order, a window of `GROUPS_PER_WINDOW` groups at a time. Each group begins with rows
    as they come, so that long and short ones stay mixed as chance mixes them; the gap at its end, as long as two long
    rows, is closed best-fit decreasing (D. S. Johnson, Near-Optimal Bin Packing Algorithms, 1973) with the rest of the
    window. Where groups hold few rows, the gap is the whole group. Rows that fit no gap come first in the next window,
    in the end in groups of their own: what no whole rows can fill is left over in the last groups, not in all.

    Args:
        lengths: tokens of each row of the dataset, none more than `capacity`, shape (n,).
        order: the rows to pack, in order, shape (m,).
        capacity: tokens of a group at most.
    """
    sizes = lengths[order].tolist()
    gap = min(2 * int(np.quantile(sizes, 0.95)), capacity) if sizes else capacity
    ends = [0, *accumulate(sizes)]
    window_tokens = GROUPS_PER_WINDOW * capacity
    groups: list[list[int]] = []
    waiting: list[int] = []  # places in `order`
    start = 0
    while start < len(sizes) or waiting:
        carried = sum(sizes[place] for place in waiting)
        end = max(start, bisect_left(ends, ends[start] + window_tokens - carried, lo=start) - 1)
        end = min(max(end, start + (not waiting)), len(sizes))
        window = [*waiting, *range(start, end)]
        tokens = carried + ends[end] - ends[start]
        start = end
        filled, waiting = _fill(window, sizes, capacity, gap, max(1, int(tokens * (1 - SPARE)) // capacity))
        groups += filled
    places = Plan.of(groups)
    return Plan(order[places.rows], places.starts)


def _fill(
    window: list[int], sizes: list[int], capacity: int, gap: int, count: int
) -> tuple[list[list[int]], list[int]]:
    """Return at most `count` groups, and the places of `window` that fit into none of them."""
    groups: list[list[int]] = []
    gaps: list[tuple[int, int]] = []  # (tokens left, group), ascending
    taken = 0
    while len(groups) < count:
        group: list[int] = []
        left = capacity
        while taken < len(window) and left > gap and sizes[window[taken]] <= left:
            left -= sizes[window[taken]]
            group.append(window[taken])
            taken += 1
        gaps.append((left, len(groups)))
        groups.append(group)
    gaps.sort()
    rest = []
    for place in sorted(window[taken:], key=sizes.__getitem__, reverse=True):
        best = bisect_left(gaps, (sizes[place], -1))
        if best == len(gaps):
            rest.append(place)
            continue
        left, group_index = gaps.pop(best)
        groups[group_index].append(place)
        insort(gaps, (left - sizes[place], group_index))
    return [group for group in groups if group], sorted(rest)
