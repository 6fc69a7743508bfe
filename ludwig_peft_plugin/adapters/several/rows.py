"""Which adapter answers each row of the data: the column that `adapters.column` names."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ludwig_peft_plugin.adapters.several.active import BASE
from ludwig_peft_plugin.config.suggest import hint
from ludwig_peft_plugin.errors import DataError


def adapter_column(config: dict[str, Any]) -> str | None:
    """Return the column of a config that names adapters, None where there is none."""
    section = config.get("adapters")
    return section.get("column") if isinstance(section, dict) else None


def adapters_of_rows(config: dict[str, Any], frame: pd.DataFrame, source: str) -> pd.Series:
    """Return the adapter of each row of a table, None where the row names none, over the table's index.

    Raises:
        DataError: the column is missing, or names an adapter that there is not.
    """
    column = adapter_column(config)
    if column not in frame.columns:
        raise DataError(
            f"adapters.column: {source} has no column {column!r}, which names the adapter of each row; "
            f"{hint(str(column), [str(name) for name in frame.columns])}"
        )
    section = config["adapters"]
    known = [*section["adapters"], *([section["merge"]["name"]] if section.get("merge") else []), BASE]
    names = [None if pd.isna(cell) or not str(cell).strip() else str(cell).strip() for cell in frame[column]]
    for row, name in enumerate(names):
        if name is not None and name not in known:
            raise DataError(
                f"Row {row + 1} of {source} names the adapter {name!r} in column {column!r}; there are "
                f"{', '.join(known)} (an empty cell is the active adapter)."
            )
    return pd.Series(names, index=frame.index, dtype=object)
