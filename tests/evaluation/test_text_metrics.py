"""Scores of answers: known values, edge cases, and what counts as code."""

import math
import sys

import pytest
from sacrebleu import corpus_bleu, corpus_chrf

from ludwig_peft_plugin.evaluation.text_metrics import (
    TEXT_METRICS,
    chrf_of_row,
    is_exact_match,
    parses,
    score_texts,
)

ALL = list(TEXT_METRICS)
ANSWERS = ["The cat sat on the mat.", "def f(x):\n    return x", "", "Привет, мир"]
TARGETS = ["The cat sat on a mat.", "def f(y):\n    return y + 1", "nothing", "Привет, мир"]


def test_perfect_answers_reach_the_highest_value():
    texts = ["x = [1, 2, 3, 4, 5]", "print('one two three four')"]
    values = score_texts(texts, texts, ALL, "python")
    assert values == pytest.approx({name: metric.highest for name, metric in TEXT_METRICS.items()})


def test_unrelated_answers_are_at_the_bottom():
    values = score_texts(["1 + )", "2 + )"], ["abc def ghi jkl", "mno pqr stu vwx"], ALL, "python")
    assert values == dict.fromkeys(ALL, 0.0)


def test_bleu_and_chrf_are_sacrebleus():
    values = score_texts(ANSWERS, TARGETS, ["bleu", "chrf"])
    assert values["bleu"] == pytest.approx(corpus_bleu(ANSWERS, [TARGETS], force=True).score)
    assert values["chrf"] == pytest.approx(corpus_chrf(ANSWERS, [TARGETS]).score)
    assert 0 < values["bleu"] < values["chrf"] < 100


def test_rouge_by_hand():
    # 4 of 5 words each; pairs: "the cat", "cat sat", "sat on" of 4 each; the longest common subsequence has 4 words.
    values = score_texts(["The cat sat on mats"], ["the cat sat on rugs!"], ["rouge1", "rouge2", "rougeL"])
    assert values == pytest.approx({"rouge1": 4 / 5, "rouge2": 3 / 4, "rougeL": 4 / 5})
    # Precision 1, recall 1/2 for single words.
    assert score_texts(["a b"], ["a b c d"], ["rouge1"]) == pytest.approx({"rouge1": 2 / 3})


def test_letters_of_any_script_are_words():
    values = score_texts(["привет_мир"], ["Привет, мир!"], ["rouge1", "rouge2"])
    assert values == pytest.approx({"rouge1": 1.0, "rouge2": 1.0})


@pytest.mark.parametrize(("answer", "target"), [("", "text"), ("text", ""), ("", "")])
def test_empty_texts_score_without_failing(answer, target):
    values = score_texts([answer], [target], ALL, "python")
    assert values.pop("exact_match") == (answer == target)
    assert values.pop("parses") == (answer == "text")
    assert set(values.values()) == {0.0}


def test_no_rows_have_no_scores():
    assert score_texts([], [], ALL, "python") == {}


def test_only_what_is_asked_for():
    assert set(score_texts(ANSWERS, TARGETS, ["rougeL", "exact_match"])) == {"rougeL", "exact_match"}
    assert "parses" not in score_texts(ANSWERS, TARGETS, ALL)


def test_exact_match_is_a_share():
    assert score_texts(ANSWERS, TARGETS, ["exact_match"]) == {"exact_match": 0.25}


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        (" x = 1\n", "x = 1", True),
        ("x  = 1", "x = 1", False),
        ("e\u0301", "\u00e9", True),
        ("A", "a", False),
        ("\ud83d", "\ud83d", True),
    ],
)
def test_exact_match(answer, target, same):
    assert is_exact_match(answer, target) == same


def test_chrf_of_a_row():
    assert chrf_of_row("same", "same") == 100
    assert 0 < chrf_of_row("some text", "same text") < 100
    assert chrf_of_row("", "x") == 0


@pytest.mark.parametrize(
    ("answer", "language", "right"),
    [
        ("x = 1", "python", True),
        ("\n    x = 1\n", "python", False),
        ("def f(:\n  pass", "python", False),
        ("", "python", False),
        (" \n", "python", False),
        ("x\0 = 1", "python", False),
        ("'\\d'", "python", True),
        ("Here:\nx = 1", "python", False),
        ("```python\nx = 1\n```", "python", True),
        ("```\nx = (\n```", "python", False),
        ("```python\nx = 1", "python", True),
        ('{"a": [1]}', "json", True),
        ("{'a': 1}", "json", False),
        ("x = 1", "json", False),
    ],
)
def test_what_parses(answer, language, right):
    assert parses(answer, language) == right


@pytest.mark.parametrize("language", ["python", "json"])
def test_deep_nesting_is_an_answer_that_does_not_parse(language):
    depth = 100 * sys.getrecursionlimit()
    assert parses("[" * depth + "]" * depth, language) is False


def test_nothing_is_executed():
    assert parses("raise SystemExit('executed')", "python")
    assert parses("__import__('os')._exit(1)", "python")


def test_values_are_finite_for_any_text():
    answers = ["\u202e\u0000", "😀" * 50, "a" * 5000, "```"]
    values = score_texts(answers, ["x", "😀", "a b", "```"], ALL, "python")
    assert all(math.isfinite(value) for value in values.values())
