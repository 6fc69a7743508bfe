"""The examples that are written beside the statistics: complete, readable, and of the right rows."""

import json

import numpy as np
import pytest

from ludwig_peft_plugin.evaluation.examples import (
    Example,
    as_ludwig_keeps_them,
    make_examples,
    spread_rows,
    write_examples,
)


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [(10, 3, [0, 4, 9]), (3, 5, [0, 1, 2]), (1, 4, [0]), (0, 4, []), (5, 0, []), (4, 1, [0])],
)
def test_rows_are_spread_evenly(rows, count, expected):
    assert spread_rows(rows, count).tolist() == expected


def test_spread_rows_never_repeat():
    for rows in range(1, 40):
        for count in range(1, 40):
            assert len(np.unique(spread_rows(rows, count))) == min(rows, count)


@pytest.fixture
def examples():
    return make_examples(
        [4, 9],
        ["Ask: ü\n", "Ask ```this```"],
        ["x = 1", "print('é')"],
        ["x = 1 ", "```python\nprint('e'\n```"],
        "python",
    )


def test_each_row_is_scored(examples):
    first, second = examples
    assert first == Example(4, "Ask: ü\n", "x = 1", "x = 1 ", True, 100.0, True)
    assert (second.row, second.exact_match, second.parses) == (9, False, False)
    assert 0 < second.chrf < 100


def test_without_a_language_nothing_is_parsed(tmp_path):
    (example,) = make_examples([0], ["p"], ["t"], ["a"], None)
    assert example.parses is None
    lines, page = write_examples(tmp_path, [example])
    assert "parses" not in lines.read_text() + page.read_text()


def test_files_hold_every_text(examples, tmp_path):
    lines, page = write_examples(tmp_path / "new" / "folder", examples, "step_12")
    assert (lines.name, page.name) == ("step_12.jsonl", "step_12.md")
    read = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [Example(**entry) for entry in read] == examples
    assert "ü" in lines.read_text(encoding="utf-8"), "readable, not escaped"
    text = page.read_text(encoding="utf-8")
    for example in examples:
        for part in (example.prompt, example.target, example.answer):
            assert part in text
    assert "## Row 4: same as the target, parses" in text
    assert "does not parse" in text
    assert "````text\nAsk ```this```\n````" in text, "a fence is longer than those it holds"


def test_ludwig_gets_its_own_form(examples):
    kept = as_ludwig_keeps_them(examples)
    assert list(kept) == ["inputs", "targets", "outputs"]
    assert kept["targets"] == ["x = 1", "print('é')"]
