"""Show the error that ended a run, and not one of Ludwig's clean-up after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

UNSET = "has_nan_or_inf_tensors"
"""A variable that Ludwig's `Trainer.train` sets after the first epoch, and reads after an error in it as well."""


@contextmanager
def first_error_shown() -> Iterator[None]:
    """Raise the error that ended the block where `trainer.skip_all_evaluation` makes Ludwig's clean-up fail on it."""
    first: BaseException | None = None
    try:
        yield
    except UnboundLocalError as error:
        first = error.__context__
        if first is None or UNSET not in str(error):
            raise
    if first is not None:
        raise first
