"""The column that says which task a row belongs to, for adapters with a prompt for each task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ludwig_peft_plugin.data.prompts import require_column
from ludwig_peft_plugin.errors import DataError

OPTION = "adapter.task_column"


@dataclass(frozen=True)
class TaskColumn:
    """Where a row's task is found.

    Attributes:
        column: of the dataset.
        count: how many tasks there are.
        names: what they are called, in the order of their numbers; None where the column holds numbers.
    """

    column: str
    count: int
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, adapter: Any) -> TaskColumn | None:
        """Return the column that an adapter section names, None for an adapter without tasks (or no adapter)."""
        column = getattr(adapter, "task_column", None)
        if column is None:
            return None
        return cls(str(column), int(adapter.num_tasks), tuple(adapter.tasks) if adapter.tasks else None)

    def found(self, columns: Iterable[str], source: str) -> str:
        """Return what a dataset calls the column.

        Raises:
            DataError: it has none; `source` is what the data are called in the message.
        """
        return require_column(self.column, columns, OPTION, source)

    def numbers(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the task of each row, shape (n,), int32.

        Raises:
            DataError: a row has none, or one that is not known.
        """
        cells = frame[self.found(frame.columns, "")]
        if self.names is not None:
            numbers = cells.astype(str).map({name: number for number, name in enumerate(self.names)})
            allowed = ", ".join(self.names)
        else:
            numbers = pd.to_numeric(cells, errors="coerce")
            numbers = numbers.where((numbers >= 0) & (numbers < self.count) & (numbers % 1 == 0))
            allowed = f"0 to {self.count - 1}"
        wrong = numbers.isna().to_numpy()
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{OPTION}: {int(wrong.sum()):,} rows have no task in the column {self.column!r}, the first (row "
                f"{frame.index[place]}) with {cells.iloc[place]!r}. A task is one of {allowed}; correct the rows, or "
                "set adapter.num_tasks and adapter.tasks."
            )
        return numbers.to_numpy(dtype=np.int32)
