"""The task column: numbers or names of the data, and clear errors for what is neither."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ludwig_peft_plugin.data.batches import collate
from ludwig_peft_plugin.data.ragged import Ragged, offsets_of
from ludwig_peft_plugin.data.tasks import TaskColumn
from ludwig_peft_plugin.data.token_rows import TokenRows, TokenRowsWriter
from ludwig_peft_plugin.errors import DataError


def column(**options: Any) -> TaskColumn:
    found = TaskColumn.of(SimpleNamespace(**{"task_column": "task", "num_tasks": 3, "tasks": None, **options}))
    assert found is not None
    return found


def test_adapters_without_tasks() -> None:
    assert TaskColumn.of(None) is None
    assert TaskColumn.of(SimpleNamespace(r=8)) is None


@pytest.mark.parametrize("cells", [[0, 2, 1], [0.0, 2.0, 1.0], ["0", "2", "1"]], ids=["int", "float", "text"])
def test_numbers(cells: list[Any]) -> None:
    numbers = column().numbers(pd.DataFrame({"task": cells}))
    assert numbers.tolist() == [0, 2, 1]
    assert numbers.dtype == np.int32


def test_names() -> None:
    named = column(tasks=["sum", "code", "7"])
    assert named.numbers(pd.DataFrame({"task": ["code", "sum", 7]})).tolist() == [1, 0, 2]


@pytest.mark.parametrize("cell", [3, -1, 0.5, "x", None, float("nan")])
def test_cells_that_are_no_task(cell: Any) -> None:
    frame = pd.DataFrame({"task": pd.Series([0, cell, 1], dtype=object, index=[10, 11, 12])})
    with pytest.raises(DataError, match=r"1 rows have no task in the column 'task', the first \(row 11\).* 0 to 2"):
        column().numbers(frame)
    with pytest.raises(DataError, match="A task is one of a, b, c"):
        column(tasks=["a", "b", "c"]).numbers(frame[1:2])


def test_a_missing_column() -> None:
    with pytest.raises(DataError, match=r"adapter.task_column names the column 'task'.*Did you mean 'tasks'"):
        column().found(["tasks", "output"], "dataset 'x.csv'")


def rows(tasks: list[int] | None) -> TokenRows:
    writer = TokenRowsWriter(targets=True)
    lengths = np.array([3, 2, 4], dtype=np.int32)
    ragged = Ragged(np.arange(9, dtype=np.int32), offsets_of(lengths))
    numbers = None if tasks is None else np.array(tasks, dtype=np.int32)
    writer.add(ragged, np.ones(3, np.int32), ["a", "b", "c"], ["d", "e", "f"], numbers)
    return writer.finish()


@pytest.mark.parametrize("tasks", [[2, 0, 1], None])
def test_tasks_are_kept_with_the_tokens(tasks: list[int] | None) -> None:
    again = TokenRows.from_batch(rows(tasks).to_batch())
    assert (None if again.tasks is None else again.tasks.tolist()) == tasks


def test_tasks_of_a_micro_batch() -> None:
    found = rows([2, 0, 1])
    dataset: Any = SimpleNamespace(
        input_ids=found.tokens, prompt_lengths=found.prompt_lengths, has_targets=True, tasks=found.tasks
    )
    batch = collate(dataset, np.array([2, 0]))
    assert batch.task_ids is not None
    assert batch.task_ids.tolist() == [1, 2]
    dataset.tasks = None
    assert collate(dataset, np.array([2, 0])).task_ids is None
