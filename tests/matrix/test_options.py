"""Every option, set to other values than its default, changes something observable, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from pydantic import ValidationError

from ludwig_peft_plugin.errors import AdapterError


def test_option_takes_effect(option: Any) -> None:
    effects: dict[str, str] = {}
    refusals: dict[str, str] = {}
    values = option.values()
    assert values, "no other value is known: list some in alternatives.py"
    for value in values:
        try:
            changed = option.with_value(value)
        except (AdapterError, ConfigValidationError, ValidationError) as error:
            refusals[repr(value)] = str(error)
            continue
        difference = changed.difference(option.baseline())
        assert difference is not None, f"{value!r} changes nothing"
        effects[repr(value)] = difference
    assert all(option.name in text for text in refusals.values()), f"refused without naming the option: {refusals}"
    assert bool(effects) != option.refused_alone, f"refused: {refusals}, with effect: {effects}"


def test_every_option_is_tried(options_tried: Any) -> None:
    tried, elsewhere, declared = options_tried
    assert tried | elsewhere == declared
    assert not tried & elsewhere
    assert len(tried) > 3 * len({kind for kind, _ in declared}), "three options for each type at least"


def test_a_value_that_does_nothing_would_be_found(bases: Any, make_case: Any, make_fingerprint: Any) -> None:
    case = make_case("lora", "llama-fp32")
    one, same = (make_fingerprint(case, lambda: case.attach(r=4)) for _ in range(2))
    assert one.difference(same) is None
    other = make_fingerprint(case, lambda: case.attach(r=4, dropout=0.3))
    assert one.difference(other) == "training"


pytestmark = [
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]
