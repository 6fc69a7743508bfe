"""Rows of different lengths in flat arrays."""

import numpy as np
import pytest

from ludwig_peft_plugin.data import ragged as ragged_module
from ludwig_peft_plugin.data.ragged import Ragged, join_rows

ROWS = [[5, 6, 7], [], [8], [9, 10, 11, 12], []]


def as_lists(ragged):
    return [row.tolist() for row in ragged]


def test_rows_come_back():
    ragged = Ragged.from_lists(ROWS)
    assert as_lists(ragged) == ROWS
    assert ragged.values.dtype == np.int32
    assert ragged.offsets.dtype == np.int64
    assert ragged.lengths.tolist() == [3, 0, 1, 4, 0]
    assert ragged[-2].tolist() == [9, 10, 11, 12]
    with pytest.raises(IndexError):
        ragged[5]


def test_a_row_is_a_view():
    ragged = Ragged.from_lists(ROWS)
    ragged[0][1] = 60
    assert ragged.values[1] == 60


def test_take_copies_in_the_given_order():
    ragged = Ragged.from_lists(ROWS)
    taken = ragged.take(np.array([3, 1, 0, 3]))
    assert as_lists(taken) == [ROWS[3], ROWS[1], ROWS[0], ROWS[3]]
    assert not np.shares_memory(taken.values, ragged.values)
    assert as_lists(ragged.take(np.array([], dtype=np.int64))) == []


def test_concatenate_keeps_order_and_frees_the_parts():
    parts = [Ragged.from_lists(ROWS[:2]), Ragged.from_lists([]), Ragged.from_lists(ROWS[2:])]
    assert as_lists(Ragged.concatenate(parts)) == ROWS
    assert parts == []
    assert len(Ragged.concatenate([])) == 0


def test_join_rows_puts_right_behind_left():
    right = [[1], [2, 3], [], [], [4, 5]]
    joined = join_rows(Ragged.from_lists(ROWS), Ragged.from_lists(right))
    assert as_lists(joined) == [left + other for left, other in zip(ROWS, right, strict=True)]


def test_pieces_are_a_view_where_nothing_has_to_move():
    ragged = Ragged.from_lists(ROWS)
    whole = ragged.pieces(ragged.offsets[:-1], ragged.lengths)
    assert as_lists(whole) == ROWS
    assert np.shares_memory(whole.values, ragged.values)
    tail = ragged.pieces(ragged.offsets[2:-1], ragged.lengths[2:])
    assert as_lists(tail) == ROWS[2:]
    assert tail.offsets[0] == 0
    cut = ragged.pieces(ragged.offsets[:-1], np.minimum(ragged.lengths, 2))
    assert as_lists(cut) == [row[:2] for row in ROWS]
    assert len(ragged.pieces(np.zeros(0, np.int64), np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize("block", [1, 3, 4, 7, 1 << 20])
def test_rows_are_gathered_a_block_at_a_time(monkeypatch, block):
    monkeypatch.setattr(ragged_module, "BLOCK", block)
    ragged = Ragged.from_lists(ROWS)
    for order in ([4, 3, 2, 1, 0], [3, 3, 3], [1, 4, 1], []):
        assert as_lists(ragged.take(np.array(order, dtype=np.int64))) == [ROWS[row] for row in order]


def test_rows_of_a_read_only_file(tmp_path):
    whole = Ragged.from_lists(ROWS)
    whole.values.tofile(tmp_path / "values")
    mapped = Ragged(np.memmap(tmp_path / "values", dtype=np.int32, mode="r"), whole.offsets)
    assert as_lists(mapped) == ROWS
    assert as_lists(mapped.take(np.array([3, 0]))) == [ROWS[3], ROWS[0]]
    assert as_lists(join_rows(mapped, whole)) == [row + row for row in ROWS]
