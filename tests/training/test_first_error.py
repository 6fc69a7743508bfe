"""The error that ended a run is shown, where Ludwig's clean-up after it fails itself."""

import pytest

from ludwig_peft_plugin.training.first_error import first_error_shown


def ludwig_train(error: Exception | None) -> bool:
    """Fail as Ludwig's trainer does after an error in the first epoch."""
    try:
        if error is not None:
            raise error
        has_nan_or_inf_tensors = False
    finally:
        clean = not has_nan_or_inf_tensors
    return clean


def other_mistake() -> int:
    if not other_mistake:
        value = 1
    return value


def other_mistake_after_an_error() -> int:
    try:
        raise ValueError
    except ValueError:
        return other_mistake()


def test_the_first_error_is_raised_with_its_cause() -> None:
    first = ValueError("no step is left")
    first.__cause__ = KeyError("cause")
    with pytest.raises(ValueError, match="no step is left") as caught, first_error_shown():
        ludwig_train(first)
    assert caught.value is first
    assert isinstance(caught.value.__cause__, KeyError)


def test_everything_else_is_as_it_was() -> None:
    with first_error_shown():
        assert ludwig_train(None)
    with pytest.raises(UnboundLocalError, match="value"), first_error_shown():
        other_mistake()
    with pytest.raises(UnboundLocalError, match="value"), first_error_shown():
        other_mistake_after_an_error()
