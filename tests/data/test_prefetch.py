"""Batches made ahead: in order, errors where they belong, and no thread left behind."""

import gc
import threading
import time

import pytest

from ludwig_peft_plugin.data.batches import StepBatch
from ludwig_peft_plugin.data.prefetch import DEPTH, Prefetch


def batch(step: int) -> StepBatch:
    return StepBatch([], step, step)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    gc.collect()
    assert threads() == 0


def until(condition) -> bool:
    """Wait up to a few seconds for a thread to get somewhere."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(condition())


def test_batches_come_in_order_and_end():
    with Prefetch(batch, range(3, 20), "cpu") as batches:
        assert [item.tokens for item in batches] == list(range(3, 20))
        assert threads() == 0  # the end of the data ends the thread
        with pytest.raises(StopIteration):
            next(batches)


def test_they_are_made_ahead_but_not_more_than_a_few():
    made = []
    with Prefetch(lambda step: made.append(step) or batch(step), range(100), "cpu") as batches:
        assert until(lambda: len(made) == DEPTH + 1)  # one more waits for room
        next(batches)
        assert until(lambda: len(made) == DEPTH + 2)
    assert len(made) <= DEPTH + 3


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def make(step: int) -> StepBatch:
        if step == 2:
            raise ValueError("row 7 is damaged")
        return batch(step)

    batches = Prefetch(make, range(9), "cpu")
    assert [next(batches).tokens for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="row 7 is damaged") as caught:
        next(batches)
    assert caught.traceback[-1].name == "make"
    assert threads() == 0


def test_an_exception_in_the_loop_ends_the_thread():
    def loop() -> None:
        with Prefetch(batch, range(1000), "cpu") as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert threads() == 0


def test_close_while_the_thread_waits_for_room_and_twice():
    batches = Prefetch(batch, range(1000), "cpu")
    assert until(lambda: batches._ready.full())
    batches.close()
    batches.close()
    assert threads() == 0


def test_a_forgotten_one_ends():
    batches = Prefetch(batch, range(1000), "cpu")
    next(batches)
    del batches
    gc.collect()
    assert threads() == 0


def test_many_short_lives():
    for count in range(200):
        with Prefetch(batch, range(count % 5), "cpu") as batches:
            assert sum(1 for _ in zip(batches, range(count % 3), strict=False)) == min(count % 5, count % 3)
    assert threads() == 0
