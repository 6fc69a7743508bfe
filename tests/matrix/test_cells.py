"""The matrix is whole: every registered type is in it, on every base, either trained or refused with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ludwig.schema.llms.peft import adapter_registry

from ludwig_peft_plugin.config.adapter_types import capabilities, quantization_problem
from ludwig_peft_plugin.errors import AdapterError

CELLS_IN_ALL = 320  # types x their bases, those that refuse included
CHECKS = 12  # of a cell that trains


def test_every_registered_type_is_expected(cells: Any) -> None:
    assert set(adapter_registry) == cells["types"]


def test_every_type_meets_every_base(cells: Any, request: pytest.FixtureRequest) -> None:
    trained, refused = cells["trained"], cells["refused"]
    assert len(trained) + len(refused) == len(set(trained + refused)) == CELLS_IN_ALL
    assert {kind for kind, _ in trained} == set(adapter_registry), "each trains on one base at least"
    folder = request.path.parent
    ran = [item for item in request.session.items if item.path.parent == folder]
    names = {(item.path.name, item.originalname) for item in ran if "case" in item.fixturenames}
    if len(names) == CHECKS:  # all of the folder was asked for
        cases = sum("case" in item.fixturenames for item in ran)
        assert cases == CHECKS * len(trained)


def test_what_is_refused_says_why(refused: Any) -> None:
    reason = refused.expected.refused[refused.base_name]
    with pytest.raises(AdapterError) as caught:
        refused.attach()
    assert re.search(reason, str(caught.value))
    assert refused.kind in str(caught.value)


def test_configs_say_what_their_classes_say(case: Any, find_problems: Any) -> None:
    assert not find_problems(case)
    if case.precision.section:
        assert quantization_problem(case.cls, case.kind, case.precision.backend) is None
    assert capabilities(case.cls).mergeable == case.cls.mergeable


def test_configs_are_refused_where_the_class_says_so(refused: Any, find_problems: Any) -> None:
    denied = refused.precision.section and quantization_problem(refused.cls, refused.kind, refused.precision.backend)
    assert [f"adapter.type: {denied}"] * bool(denied) == find_problems(refused)
