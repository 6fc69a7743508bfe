"""The rows of each set are those of stock Ludwig."""

import numpy as np
import pandas as pd
import pytest
from ludwig.backend import LOCAL_BACKEND
from ludwig.data.split import split_dataset

from ludwig_peft_plugin.data.splits import sample_rows, split_rows, split_section
from ludwig_peft_plugin.errors import DataError

FRAME = pd.DataFrame(
    {
        "text": [f"row {row}" for row in range(60)],
        "split": [str(row % 3) for row in range(60)],
        "kind": ["a", "b"] * 30,
        "day": [f"2024-01-{1 + row % 28:02d}" for row in range(60)],
    }
)


@pytest.mark.parametrize(
    "split",
    [
        {"type": "random", "probabilities": [0.7, 0.1, 0.2]},
        {"type": "random", "probabilities": [0.9, 0.1, 0.0]},
        {"type": "fixed", "column": "split"},
        {"type": "hash", "column": "text", "probabilities": [0.7, 0.1, 0.2]},
        {"type": "stratify", "column": "kind", "probabilities": [0.6, 0.2, 0.2]},
        {"type": "datetime", "column": "day", "probabilities": [0.6, 0.2, 0.2]},
    ],
    ids=lambda split: split["type"],
)
@pytest.mark.parametrize("seed", [42, 7])
def test_equals_ludwig(split, seed):
    stock = split_dataset(FRAME.copy(), {"split": split}, LOCAL_BACKEND, seed)
    rows = split_rows(FRAME, split_section({"split": split}, FRAME.columns, "the data"), seed, "the data")
    for ours, theirs in zip((rows.training, rows.validation, rows.test), stock, strict=True):
        assert FRAME["text"].iloc[ours].tolist() == ([] if theirs is None else theirs["text"].tolist())


def test_rows_with_an_index_of_their_own():
    frame = FRAME.set_index(np.repeat([5, 6], 30))
    rows = split_rows(frame, {"type": "random", "probabilities": [0.7, 0.1, 0.2]}, 42, "the data")
    everything = np.concatenate([rows.training, rows.validation, rows.test])
    assert sorted(everything) == list(range(60))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10])
def test_few_rows_leave_some_to_train(size):
    rows = split_rows(FRAME.iloc[:size], {"type": "random", "probabilities": [0.7, 0.1, 0.2]}, 42, "the data")
    assert len(rows.training) >= 1
    assert sum(map(len, (rows.training, rows.validation, rows.test))) == size


def test_the_datas_frame_is_not_changed():
    frame = FRAME.copy()
    for split in ({"type": "fixed", "column": "split"}, {"type": "hash", "column": "text"}):
        split_rows(frame, split, 42, "the data")
    assert frame.equals(FRAME)


def test_a_split_column_that_is_not_used_is_said(caplog):
    split_rows(FRAME, {"type": "random", "probabilities": [0.7, 0.1, 0.2]}, 42, "the data")
    assert "split: {type: fixed}" in caplog.text
    caplog.clear()
    split_rows(FRAME.drop(columns="split"), {"type": "random"}, 42, "the data")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["train", "test"], r"must hold 0 \(training\), 1 \(validation\) and 2 \(test\), but 2 of 2 rows hold 'train'"),
        (["1", "2"], "leaves no training rows: no row of the data has 0 in the column 'split'"),
        (["0", "0.5"], "but 1 of 2 rows hold '0.5'"),
    ],
)
def test_columns_that_are_no_split(values, said):
    frame = pd.DataFrame({"text": ["a", "b"], "split": values})
    with pytest.raises(DataError, match=said):
        split_rows(frame, {"type": "fixed", "column": "split"}, 42, "the data")


def test_rows_in_no_set_are_counted(caplog):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "split": ["0", "3", "2.0"]})
    rows = split_rows(frame, {"type": "fixed", "column": "split"}, 42, "the data")
    assert (rows.training.tolist(), rows.validation.tolist(), rows.test.tolist()) == ([0], [], [2])
    assert "1 of 3 rows are in no set" in caplog.text


def test_no_training_rows():
    with pytest.raises(DataError, match=r"leaves no training rows: of 60 rows"):
        split_rows(FRAME.drop(columns="split"), {"type": "random", "probabilities": [0.0, 0.5, 0.5]}, 42, "x")


def test_a_split_column_that_is_not_there():
    with pytest.raises(DataError, match=r"type: fixed\) names the column 'splits'.*Did you mean 'split'"):
        split_section({"split": {"type": "fixed", "column": "splits"}}, FRAME.columns, "the data")


def test_samples_equal_ludwig():
    from ludwig.data.preprocessing import _get_sampled_dataset_df

    for ratio, size in ((0.5, None), (1.0, 10), (1.0, None)):
        stock = _get_sampled_dataset_df(FRAME, LOCAL_BACKEND.df_engine, ratio, size, 42)
        assert sample_rows(FRAME, {"sample_ratio": ratio, "sample_size": size}, 42).equals(stock)
    with pytest.raises(DataError, match="leaves none of 60 rows"):
        sample_rows(FRAME, {"sample_ratio": 0.001}, 42)


def test_classes_cannot_be_balanced():
    with pytest.raises(DataError, match=r"preprocessing.oversample_minority balances classes"):
        sample_rows(FRAME, {"oversample_minority": 0.5}, 42)


def test_a_split_does_not_copy_the_text(monkeypatch):
    from ludwig.data import split as stock

    seen = []
    original = stock.split_dataset

    def record(table, *args):
        seen.append(list(table.columns))
        return original(table, *args)

    monkeypatch.setattr(stock, "split_dataset", record)
    split_rows(FRAME, {"type": "random", "probabilities": [0.7, 0.1, 0.2]}, 42, "the data")
    split_rows(FRAME, {"type": "fixed", "column": "split"}, 42, "the data")
    assert [columns[:-1] for columns in seen] == [[], ["split"]]
