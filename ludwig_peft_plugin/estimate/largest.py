"""Find the largest micro-batch that fits into a GPU."""

from __future__ import annotations

from collections.abc import Callable

TOKEN_STEP = 128
"""Token budgets are searched in steps of this many tokens."""
MOST = 2**20
STRAIGHT_TRIES = 8


def largest(needed: Callable[[int], int], available: int, start: int = 2, step: int = 1) -> int:
    """Return the largest multiple n of `step` with `needed(n) <= available`, 0 when there is none.

    `needed` grows with n, nearly in a straight line, so that each try is where the line through two earlier ones
    reaches `available`; a handful of tries is enough.

    Args:
        needed: bytes that a batch of n needs.
        available: bytes there are.
        start: a batch to begin with.
        step: what n is a multiple of.
    """
    known: dict[int, int] = {}

    def fits(count: int) -> bool:
        if count not in known:
            known[count] = needed(count * step)
        return known[count] <= available

    if not fits(1):
        return 0
    low, high = 1, MOST
    guess, tries = max(2, start // step), 0
    while high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        tries += 1
        # Straight through the smallest batch and the last one; in the middle where that does not settle it.
        slope = max(1.0, (known[guess] - known[1]) / (guess - 1))
        crossing = 1 + int((available - known[1]) / slope)
        guess = min(max(crossing if tries < STRAIGHT_TRIES else (low + high) // 2, low + 1), high - 1)
    return low * step
