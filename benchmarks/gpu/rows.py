"""The rows every tool trains on: instructions and functions of the Python standard library, as one CSV a kind.

The shipped dataset has 2,059 rows; with the template below a row has 117 tokens of the shipped tokenizer on average,
end-of-sequence token included. A kind is a number of tokens a row is to have at least (0: rows as they are).
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "datasets" / "stdlib_instructions.csv"
TEMPLATE = "### Instruction: {instruction}\n### Response: "
COLUMNS = ["instruction", "output", "split"]
TRAIN = 0  # Ludwig's number of the training split; all rows are in it
LONG_ROWS = 60
PROMPT_LINES = (0, 1, 2, 4, 8, 16, 32)


def source_rows() -> list[dict[str, str]]:
    """Return the rows of the shipped dataset, in its order."""
    with SOURCE.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def training_rows(tokenizer: Any, length: int = 0) -> list[dict[str, Any]]:
    """Return the training rows: one function each, or with `length` as many functions as that many tokens take."""
    rows = source_rows()
    if not length:
        return [{"instruction": row["instruction"], "output": row["output"], "split": TRAIN} for row in rows]
    return list(itertools.islice(_long_rows(rows, tokenizer, length), LONG_ROWS))


def _long_rows(rows: list[dict[str, str]], tokenizer: Any, length: int) -> Iterator[dict[str, Any]]:
    """Yield rows of functions until each has `length` tokens and some to cut off."""
    texts = [f"# {row['instruction']}\n{row['output']}\n\n" for row in rows]
    counts = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    source = itertools.cycle(zip(rows, texts, counts, strict=True))
    while True:
        row, text, count = next(source)
        parts, total = [text], count
        while total < length:
            _, text, count = next(source)
            parts.append(text)
            total += count
        yield {"instruction": row["instruction"], "output": "".join(parts), "split": TRAIN}


def question_rows(count: int) -> list[dict[str, Any]]:
    """Return `count` rows whose prompts have mixed lengths: an instruction and 0 to 32 lines of other functions."""
    rows = source_rows()
    code = [line for row in rows for line in row["output"].splitlines()]
    questions = []
    for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
        start, lines = 37 * number % (len(code) - max(PROMPT_LINES)), PROMPT_LINES[number % len(PROMPT_LINES)]
        context = "".join(f"\n{line}" for line in code[start : start + lines])
        questions.append({"instruction": row["instruction"] + context, "output": row["output"], "split": TRAIN})
    return questions


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as a CSV."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read rows from a CSV."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def mean_tokens(rows: list[dict[str, Any]], tokenizer: Any, limit: int) -> float:
    """Return the mean number of tokens of a row: prompt, output and the end-of-sequence token, cut off at `limit`."""
    prompts = tokenizer([TEMPLATE.format(instruction=row["instruction"]) for row in rows])["input_ids"]
    outputs = tokenizer([row["output"] for row in rows])["input_ids"]
    counts = [min(limit, len(p) + len(o) + 1) for p, o in zip(prompts, outputs, strict=True)]
    return sum(counts) / len(counts)
