"""Generated answers to read: what was asked, what was expected, what came, and how near that is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ludwig_peft_plugin.evaluation.text_metrics import chrf_of_row, is_exact_match, parses

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset

FILE_NAME = "examples"


@dataclass(frozen=True)
class Example:
    """One row with its answer.

    Attributes:
        row: its number in the dataset, from 0.
        prompt: the whole prompt, as the model got it.
        target: the answer of the dataset.
        answer: what the model generated.
        exact_match: whether answer and target are the same text.
        chrf: how near they are, from 0 to 100.
        parses: whether the answer is code; None where no language is configured.
    """

    row: int
    prompt: str
    target: str
    answer: str
    exact_match: bool
    chrf: float
    parses: bool | None = None

    @property
    def texts(self) -> tuple[str, str, str]:
        """Prompt, target and answer."""
        return self.prompt, self.target, self.answer


def spread_rows(rows: int, count: int) -> np.ndarray:
    """Return `count` of `rows` row numbers, evenly spread and ascending, all of them where there are fewer."""
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).round().astype(np.int64)) if rows else np.arange(0)


def texts_of(dataset: TokenDataset, column: str, rows: np.ndarray) -> list[str]:
    """Return the text of some rows of the prompt's or the answer's column."""
    return [str(text) for text in dataset.frame[column].iloc[rows]]


def make_examples(
    rows: Sequence[int], prompts: Sequence[str], targets: Sequence[str], answers: Sequence[str], language: str | None
) -> list[Example]:
    """Return the examples of some rows, each scored."""
    return [
        Example(
            row=int(row),
            prompt=prompt,
            target=target,
            answer=answer,
            exact_match=is_exact_match(answer, target),
            chrf=round(chrf_of_row(answer, target), 2),
            parses=parses(answer, language) if language else None,
        )
        for row, prompt, target, answer in zip(rows, prompts, targets, answers, strict=True)
    ]


def as_ludwig_keeps_them(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Return examples as Ludwig's progress tracker holds them, for its CSV files and its callbacks."""
    return {
        "inputs": [example.prompt for example in examples],
        "targets": [example.target for example in examples],
        "outputs": [example.answer for example in examples],
    }


def write_examples(folder: str | Path, examples: Sequence[Example], name: str = FILE_NAME) -> list[Path]:
    """Write `<name>.jsonl`, one example a line, and `<name>.md`, the same to read; return both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines, page = folder / f"{name}.jsonl", folder / f"{name}.md"
    lines.write_text(
        "".join(json.dumps(_fields(example), ensure_ascii=False) + "\n" for example in examples), encoding="utf-8"
    )
    page.write_text(_page(examples), encoding="utf-8")
    return [lines, page]


def _fields(example: Example) -> dict[str, Any]:
    return {name: value for name, value in asdict(example).items() if value is not None}


def _page(examples: Sequence[Example]) -> str:
    """Return the examples as Markdown."""
    parts = ["# Examples\n"]
    for example in examples:
        facts = ["same as the target" if example.exact_match else f"chrF {example.chrf:.1f}"]
        if example.parses is not None:
            facts.append("parses" if example.parses else "does not parse")
        parts.append(f"## Row {example.row}: {', '.join(facts)}\n")
        for title in ("prompt", "target", "answer"):
            parts.append(f"{title.capitalize()}:\n\n{_fenced(getattr(example, title))}\n")
    return "\n".join(parts)


def _fenced(text: str) -> str:
    """Return text as a code block, behind a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
