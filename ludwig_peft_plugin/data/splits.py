"""Which rows are used, and which of them train, validate and test: Ludwig's own sampling and splitting."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ludwig_peft_plugin.data.prompts import require_column
from ludwig_peft_plugin.errors import DataError

logger = logging.getLogger(__name__)

_SPLIT_COLUMN = "split"
_ROW_COLUMN = "__row__"


@dataclass(frozen=True)
class SplitRows:
    """The positions, in a table, of the rows of each set, in the order Ludwig's splitter gives."""

    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def sample_rows(frame: pd.DataFrame, preprocessing: dict[str, Any], seed: int) -> pd.DataFrame:
    """Return the rows that `preprocessing.sample_ratio` and `sample_size` ask for, as Ludwig chooses them.

    Raises:
        DataError: the ratio leaves no row, or classes are to be balanced.
    """
    from ludwig.backend import LOCAL_BACKEND
    from ludwig.data.preprocessing import _get_sampled_dataset_df

    for option in ("oversample_minority", "undersample_majority"):
        if preprocessing.get(option):
            raise DataError(f"preprocessing.{option} balances classes, which a text output has not: remove it.")
    ratio, size = preprocessing.get("sample_ratio"), preprocessing.get("sample_size")
    ratio = 1.0 if ratio is None else ratio
    if ratio >= 1.0 and not size:
        return frame
    if ratio < 1.0 and len(frame) * ratio < 1:
        raise DataError(f"preprocessing.sample_ratio: {ratio} leaves none of {len(frame):,} rows: raise it.")
    sample: Any = _get_sampled_dataset_df
    sampled: pd.DataFrame = sample(frame, LOCAL_BACKEND.df_engine, ratio, size, seed)
    return sampled


def split_section(preprocessing: dict[str, Any], columns: Iterable[str], source: str) -> dict[str, Any]:
    """Return `preprocessing.split` with its column's name as it is in the data.

    Raises:
        DataError: the data have no such column.
    """
    section = dict(preprocessing.get("split") or {"type": "random"})
    if section.get("column") is not None:
        option = f"preprocessing.split (type: {section['type']})"
        section["column"] = require_column(section["column"], columns, option, source)
    return section


def split_rows(frame: pd.DataFrame, split: dict[str, Any], seed: int, source: str) -> SplitRows:
    """Return the rows of each set; the same ones, in the same order, as stock Ludwig's.

    Args:
        frame: the rows.
        split: a config's `preprocessing.split`, with the column's name as it is in `frame` (see `split_section`).
        seed: of the random and stratified split.
        source: what the data are called in errors.

    Raises:
        DataError: a fixed split's column holds something else than 0, 1 and 2, or no row is left to train.
    """
    from ludwig.backend import LOCAL_BACKEND
    from ludwig.data.split import split_dataset

    # Ludwig's splitters copy and shuffle whole tables: they get the column they read, and one they keep.
    columns = [] if split.get("column") is None else [split["column"]]
    table = frame[columns].reset_index(drop=True).assign(**{_ROW_COLUMN: np.int8(0)})
    if split["type"] == "fixed":
        table = _with_numbers(table, split["column"], source)
    elif split["type"] == "random" and _looks_like_split(frame):
        logger.warning(
            "The data have a column %r of 0, 1 and 2, but rows are split at random. To use the column: "
            "preprocessing: {split: {type: fixed}}.",
            _SPLIT_COLUMN,
        )
    try:
        parts = split_dataset(table, {"split": split}, LOCAL_BACKEND, seed)
    except (ValueError, TypeError) as error:
        raise DataError(f"preprocessing.split (type: {split['type']}) cannot be applied: {error}") from error
    none = np.zeros(0, dtype=np.int64)
    rows = SplitRows(*(none if part is None else part.index.to_numpy() for part in parts))
    if not len(rows.training):
        raise DataError(
            f"preprocessing.split leaves no training rows: of {len(frame):,} rows, {len(rows.validation):,} validate "
            f"and {len(rows.test):,} test. Change split.probabilities, or the fixed split's column (0 is training)."
        )
    return rows


def _with_numbers(frame: pd.DataFrame, column: str, source: str) -> pd.DataFrame:
    """Return the frame with a fixed split's column as integers, after checking what it holds."""
    numbers = pd.to_numeric(frame[column], errors="coerce")
    wrong = frame[column][~(numbers == np.floor(numbers))]
    if len(wrong):
        shown = ", ".join(repr(value) for value in wrong.unique()[:5])
        raise DataError(
            f"preprocessing.split: the column {column!r} of {source} must hold 0 (training), 1 (validation) and 2 "
            f"(test), but {len(wrong):,} of {len(frame):,} rows hold {shown}."
        )
    outside = int((~numbers.isin((0, 1, 2))).sum())
    if outside:
        logger.warning(
            "preprocessing.split: %s of %s rows are in no set, because their %r is neither 0, 1 nor 2.",
            f"{outside:,}",
            f"{len(frame):,}",
            column,
        )
    if not (numbers == 0).any():
        raise DataError(
            f"preprocessing.split leaves no training rows: no row of {source} has 0 in the column {column!r}."
        )
    return frame.assign(**{column: numbers.clip(-128, 127).astype(np.int8)})


def _looks_like_split(frame: pd.DataFrame) -> bool:
    if _SPLIT_COLUMN not in frame:
        return False
    numbers = pd.to_numeric(frame[_SPLIT_COLUMN], errors="coerce")
    return bool(numbers.isin((0, 1, 2)).all()) and numbers.nunique() > 1
