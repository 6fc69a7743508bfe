"""Rows are grouped by count, by tokens, or packed: each once, none cut, groups full and mixed."""

import time

import numpy as np
import pytest

from ludwig_peft_plugin.data.packing import Plan, by_best_fit, by_count, by_tokens, token_capacity
from ludwig_peft_plugin.errors import DataError


def lengths_of(count: int, seed: int = 0, longest: int = 1024) -> np.ndarray:
    """Row lengths as instruction data has them: 115 on average, a few much longer."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(4.5, 0.7, count), 10, longest).astype(np.int64)


def order_of(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def sums(plan: Plan, lengths: np.ndarray) -> np.ndarray:
    return np.array([lengths[plan[index]].sum() for index in range(len(plan))])


def fill(plan: Plan, lengths: np.ndarray, capacity: int) -> float:
    return float(lengths.sum() / (len(plan) * capacity))


def test_by_count():
    plan = by_count(np.array([3, 1, 2, 0, 4]), 2)
    assert [plan[index].tolist() for index in range(len(plan))] == [[3, 1], [2, 0], [4]]


def test_by_tokens_takes_rows_as_they_come():
    lengths = np.array([5, 4, 3, 2, 9, 1])
    plan = by_tokens(lengths, np.array([0, 1, 2, 3, 4, 5]), 9)
    assert [plan[index].tolist() for index in range(len(plan))] == [[0, 1], [2, 3], [4], [5]]


@pytest.mark.parametrize("group", [by_tokens, by_best_fit])
def test_every_row_is_in_one_group_that_has_room_for_it(group):
    generator = np.random.default_rng(0)
    for _ in range(300):
        count, capacity = int(generator.integers(0, 60)), int(generator.integers(1, 40))
        lengths = generator.integers(1, capacity + 1, count)
        plan = group(lengths, generator.permutation(count), capacity)
        assert sorted(plan.rows.tolist()) == list(range(count))
        assert ((sums(plan, lengths) <= capacity) & (sums(plan, lengths) > 0)).all()


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
def test_usual_data_fill_more_than_99_percent(capacity):
    lengths = lengths_of(25_000)
    assert fill(by_best_fit(lengths, order_of(25_000), capacity), lengths, capacity) > 0.99


@pytest.mark.parametrize(
    ("lengths", "capacity", "share"),
    [
        (np.random.default_rng(0).integers(50, 1000, 20_000), 2048, 0.99),  # groups of a few rows
        (np.random.default_rng(0).integers(300, 1024, 20_000), 1024, 0.9),  # most groups of one or two
        (np.tile([40, 700, 324], 5_000), 1064, 0.98),
        (np.full(1_000, 64), 1024, 0.98),
    ],
)
def test_unusual_data_fill_as_far_as_they_can(lengths, capacity, share):
    assert fill(by_best_fit(lengths, order_of(len(lengths)), capacity), lengths, capacity) > share


@pytest.mark.parametrize("count", [500, 2_000, 10_000])
def test_only_the_last_group_lacks_rows(count):
    lengths = lengths_of(count)
    filled = sums(by_best_fit(lengths, order_of(count), 8192), lengths) / 8192
    assert len(filled) == -(-int(lengths.sum()) // 8192)
    assert filled[:-1].min() > 0.995


def test_groups_mix_long_and_short_rows_as_chance_does():
    """Best fit alone would put the longest rows together in one group and the shortest in another."""
    lengths, capacity = lengths_of(25_000), 8192

    def spread(plan: Plan) -> float:
        groups = [lengths[plan[index]] for index in range(len(plan))]
        return float(np.std([group.mean() for group in groups if group.sum() > 0.9 * capacity]))  # not the last

    by_chance = spread(by_tokens(lengths, order_of(25_000), capacity))
    by_length = spread(by_tokens(lengths, np.argsort(lengths), capacity))
    packed = spread(by_best_fit(lengths, order_of(25_000), capacity))
    assert packed < 2 * by_chance
    assert packed < by_length / 4


def test_depends_on_the_order_alone():
    lengths = lengths_of(5_000)
    first, again = (by_best_fit(lengths, order_of(5_000), 2048) for _ in range(2))
    other = by_best_fit(lengths, order_of(5_000, seed=2), 2048)
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.rows, other.rows)


def test_a_million_rows_take_seconds():
    lengths = lengths_of(1_000_000)
    started = time.process_time()
    plan = by_best_fit(lengths, order_of(len(lengths)), 8192)
    assert time.process_time() - started < 15
    assert fill(plan, lengths, 8192) > 0.999


@pytest.mark.parametrize(
    ("tokens", "packing", "batch_size", "limit", "expected"),
    [
        (None, False, 4, 100, None),
        (500, False, 1, None, 500),
        (500, True, 1, 100, 500),
        (None, True, 4, 100, 400),
        (None, True, 4, None, 4 * 90),
    ],
)
def test_capacity(tokens, packing, batch_size, limit, expected):
    assert token_capacity(np.array([10, 90, 40]), tokens, packing, batch_size, limit) == expected


def test_a_row_longer_than_a_batch_is_an_error_that_names_option_and_row():
    lengths = np.array([10, 90, 40])
    with pytest.raises(DataError, match=r"trainer\.tokens_per_batch: 64.*90 tokens of row 1 .*at least 90"):
        token_capacity(lengths, 64, False, 1, None)
    with pytest.raises(DataError, match=r"trainer\.packing.* 64 tokens.*90 tokens of row 1 .*tokens_per_batch: 90"):
        token_capacity(lengths, None, True, 2, 32)
