"""Scores of generated answers against the texts they should have been.

BLEU and chrF are sacrebleu's, on its scale from 0 to 100; ROUGE is torchmetrics', an F1 from 0 to 1, as are the shares.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Texts = Sequence[str]


@dataclass(frozen=True)
class TextMetric:
    """One score over all answers; more is better.

    Attributes:
        highest: its value for perfect answers; 0 is the lowest.
        about: what it says, in a line.
    """

    name: str
    highest: float
    about: str


TEXT_METRICS = {
    metric.name: metric
    for metric in (
        TextMetric("exact_match", 1, "share of answers that are the target, white space around them aside"),
        TextMetric("bleu", 100, "BLEU of words, over all answers together (Papineni et al., 2002; sacrebleu)"),
        TextMetric("chrf", 100, "chrF: F-score of groups of up to 6 characters (Popovic, 2015; sacrebleu)"),
        TextMetric("rouge1", 1, "ROUGE-1: F1 of words, mean over answers (Lin, 2004)"),
        TextMetric("rouge2", 1, "ROUGE-2: F1 of pairs of words, mean over answers"),
        TextMetric("rougeL", 1, "ROUGE-L: F1 of the longest common subsequence of words, mean over answers"),
        TextMetric("parses", 1, "share of answers that are code of `evaluation.language`; nothing is executed"),
    )
}
FENCE = re.compile(r"\s*```[^\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def score_texts(answers: Texts, targets: Texts, names: Sequence[str], language: str | None = None) -> dict[str, float]:
    """Return the metrics `names` of `answers` against `targets`, one of each a row; nothing where there are no rows.

    An empty answer or target has nothing in common with any text: it scores 0, but two empty texts match exactly.
    """
    if not answers:
        return {}
    values: dict[str, float] = {}
    if "exact_match" in names:
        values["exact_match"] = _share(is_exact_match(a, t) for a, t in zip(answers, targets, strict=True))
    if "bleu" in names:
        values["bleu"] = _bleu(answers, targets)
    if "chrf" in names:
        values["chrf"] = _chrf(answers, targets)
    values |= _rouge(answers, targets, tuple(name for name in names if name.startswith("rouge")))
    if "parses" in names and language:
        values["parses"] = _share(parses(answer, language) for answer in answers)
    return values


def is_exact_match(answer: str, target: str) -> bool:
    """Return whether two texts are the same, white space around them and ways to write an accent aside."""
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", target).strip()


def chrf_of_row(answer: str, target: str) -> float:
    """Return chrF of one answer, from 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().sentence_score(answer, [target]).score)


def parses(answer: str, language: str) -> bool:
    """Return whether an answer, or the fenced block it begins with, is code of `language`; empty text is not."""
    fenced = FENCE.match(answer)
    code = (fenced.group(1) if fenced else answer).strip("\n")
    if not code.strip():
        return False
    try:
        with warnings.catch_warnings():  # such as for an invalid escape, which parses all the same
            warnings.simplefilter("ignore")
            LANGUAGES[language](code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return False
    return True


LANGUAGES: dict[str, Callable[[str], object]] = {"python": ast.parse, "json": json.loads}


def _bleu(answers: Texts, targets: Texts) -> float:
    from sacrebleu.metrics.bleu import BLEU

    # `force`: do not warn about spaces before full stops.
    return min(100.0, float(BLEU(force=True).corpus_score(list(answers), [list(targets)]).score))


def _chrf(answers: Texts, targets: Texts) -> float:
    from sacrebleu.metrics.chrf import CHRF

    return min(100.0, float(CHRF().corpus_score(list(answers), [list(targets)]).score))


def _rouge(answers: Texts, targets: Texts, names: tuple[str, ...]) -> dict[str, float]:
    if not names:
        return {}
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(
        list(answers), list(targets), rouge_keys=names, normalizer=_words_apart, tokenizer=lambda text: text.split()
    )
    return {name: float(scores[f"{name}_fmeasure"]) for name in names}


def _words_apart(text: str) -> str:
    """Return a text as its words in lower case: ROUGE's own rule, which is for ASCII, for letters of any script."""
    return re.sub(r"[\W_]+", " ", text.lower())


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)
