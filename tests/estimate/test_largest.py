"""The search for the largest batch: exact, and in few tries."""

from __future__ import annotations

from typing import Any

import pytest

from ludwig_peft_plugin.estimate.largest import largest


class Needs:
    """A memory curve that counts how often it is asked."""

    def __init__(self, curve: Any) -> None:
        self.curve = curve
        self.tries = 0

    def __call__(self, size: int) -> int:
        self.tries += 1
        return int(self.curve(size))


@pytest.mark.parametrize("available", [0, 1000, 1010, 1019, 1020, 54321, 10**7])
@pytest.mark.parametrize("start", [1, 2, 64])
def test_finds_the_last_that_fits_on_a_line(available: int, start: int) -> None:
    needed = Needs(lambda size: 1000 + 10 * size)
    expected = max(0, (available - 1000) // 10)
    assert largest(needed, available, start) == expected
    assert needed.tries <= 6


@pytest.mark.parametrize("step", [1, 128])
@pytest.mark.parametrize(
    "curve",
    [
        lambda size: 100 + max(7 * size, 3 * size + 4000),  # the peak moves from one place to another
        lambda size: 512 * -(-(1000 + 13 * size) // 512),  # rounded up to blocks
        lambda size: 5 + size**1.1,
    ],
)
def test_fits_at_n_and_not_at_the_next(curve: Any, step: int) -> None:
    available = 50_000
    needed = Needs(curve)
    found = largest(needed, available, 2, step)
    assert found % step == 0
    assert needed.curve(found) <= available < needed.curve(found + step)
    assert needed.tries <= 30


def test_nothing_fits() -> None:
    assert largest(lambda size: 10, 9) == 0
