"""A list of integer sequences of different lengths in two flat arrays, in memory or in a mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

BLOCK = 1 << 20  # elements that are gathered at once: each needs 16 bytes of indices


class Ragged:
    """`n` rows of token ids, one after the other.

    Attributes:
        values: the rows' elements, shape (total,), int32; read-only where they are a mapped file.
        offsets: where each row starts, and where the last one ends, shape (n + 1,), int64.
    """

    __slots__ = ("offsets", "values")

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values = values
        self.offsets = offsets

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Return the rows of a list of lists."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        offsets = offsets_of(lengths)
        values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def concatenate(cls, parts: list[Ragged]) -> Ragged:
        """Return the rows of all parts in order. `parts` is emptied, so that no more than one copy stays in memory."""
        offsets = offsets_of(np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in parts)]))
        values = np.empty(int(offsets[-1]), dtype=np.int32)
        parts.reverse()
        start = 0
        while parts:
            part = parts.pop().values
            values[start : start + len(part)] = part
            start += len(part)
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return row `index` as a view, shape (length,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row, shape (n,), int64."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of the two arrays, in memory or in a file."""
        return int(self.values.nbytes + self.offsets.nbytes)

    def take(self, indices: np.ndarray) -> Ragged:
        """Return the given rows, in the given order, as a copy in memory."""
        return self._gather(self.offsets[:-1][indices], self.lengths[indices])

    def pieces(self, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Return the rows that start at `starts` in `values` and have `lengths` elements; both (m,).

        The elements are a view where each row begins at the end of the one before, and a copy otherwise.
        """
        if len(starts) and np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
            offsets = offsets_of(lengths)
            return Ragged(self.values[starts[0] : starts[0] + offsets[-1]], offsets)
        return self._gather(starts, lengths)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
        offsets = offsets_of(lengths)
        values = np.empty(int(offsets[-1]), dtype=np.int32)
        for first, last in _blocks(offsets):
            begin, end = offsets[first], offsets[last]
            source = np.repeat(starts[first:last] - offsets[first:last], lengths[first:last]) + np.arange(begin, end)
            np.take(self.values, source, out=values[begin:end], mode="clip")
        return Ragged(values, offsets)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return where rows of these lengths start and the last one ends, shape (n + 1,), int64."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def join_rows(left: Ragged, right: Ragged) -> Ragged:
    """Return rows that are each a row of `left` followed by the same row of `right`."""
    lengths = np.stack([left.lengths, right.lengths], axis=1)
    offsets = offsets_of(lengths.sum(axis=1))
    values = np.empty(int(offsets[-1]), dtype=np.int32)
    from_left = np.repeat(np.tile([True, False], len(left)), lengths.reshape(-1))
    values[from_left] = left.values
    values[~from_left] = right.values
    return Ragged(values, offsets)


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows (first, one after the last) of about `BLOCK` elements, at least one row each."""
    first, rows = 0, len(offsets) - 1
    while first < rows:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = min(max(last, first + 1), rows)
        yield first, last
        first = last
