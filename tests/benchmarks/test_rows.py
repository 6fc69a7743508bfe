"""The rows of the benchmarks."""

import pytest

from benchmarks.gpu.make_model import TOKENIZER
from benchmarks.gpu.rows import PROMPT_LINES, mean_tokens, question_rows, read_rows, training_rows, write_rows


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_there_are_enough_rows_of_about_115_tokens(tokenizer):
    rows = training_rows(tokenizer)
    assert len(rows) >= 2000
    assert mean_tokens(rows, tokenizer, 1024) == pytest.approx(116, abs=4)
    assert mean_tokens(rows, tokenizer, 10) == 10


def test_long_rows_fill_their_length_and_are_not_the_same(tokenizer):
    rows = training_rows(tokenizer, 4096)
    assert mean_tokens(rows, tokenizer, 4096) == 4096
    assert len({row["output"] for row in rows}) == len(rows)


def test_questions_have_mixed_lengths_and_are_the_same_every_time():
    rows = question_rows(256)
    lines = {row["instruction"].count("\n") for row in rows}
    assert len(rows) == 256
    assert len(lines) >= len(PROMPT_LINES)
    assert rows == question_rows(256)


def test_rows_survive_the_file(tmp_path, tokenizer):
    rows = training_rows(tokenizer)[:20]
    write_rows(rows, tmp_path / "rows.csv")
    assert read_rows(tmp_path / "rows.csv") == [{**row, "split": "0"} for row in rows]
