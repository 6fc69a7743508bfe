"""Make `stdlib_instructions.csv`: documented functions of the Python standard library as instruction, input, output.

    python datasets/make_stdlib_instructions.py

Which functions, and why none of them is in the base model's training text: `scripts/stdlib_corpus.py`.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from stdlib_corpus import held_out_functions  # noqa: E402
from stdlib_source import fraction, library_sources  # noqa: E402

COLUMNS = ["instruction", "input", "output", "split"]
TRAIN, VALIDATION, TEST = 0, 1, 2
PYTHON = (3, 12)


def split_of(key: str) -> int:
    """80 in 100 functions go to train, 10 to validation, 10 to test; by a hash of the function's name alone."""
    place = fraction("split " + key)
    return TRAIN if place < 0.8 else VALIDATION if place < 0.9 else TEST


def main() -> None:
    """Write the CSV and print the number of rows of each split."""
    parser = argparse.ArgumentParser(description="Make the instruction dataset from the running Python's library.")
    parser.add_argument("--out", type=Path, default=HERE / "stdlib_instructions.csv")
    out: Path = parser.parse_args().out
    if sys.version_info[:2] != PYTHON:
        print(f"warning: the shipped file is made with Python 3.12, this is {platform.python_version()}; rows differ")
    functions, _ = held_out_functions(library_sources())
    rows = [[f.instruction, f.signature, f.output, split_of(f.key)] for f in functions]
    with out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    counts = Counter(row[3] for row in rows)
    print(f"{out.name}: {len(rows)} rows; train {counts[TRAIN]}, validation {counts[VALIDATION]}, test {counts[TEST]}")


if __name__ == "__main__":
    main()
