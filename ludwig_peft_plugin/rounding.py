"""Whole numbers brought up to a multiple of another."""


def rounded_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step`, at least 1, that is not less than `number`."""
    return -(-number // step) * step
