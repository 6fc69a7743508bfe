"""What tokens depend on: the same content gives the same hash, any other one another."""

import copy
import shutil

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from ludwig_peft_plugin.data.fingerprints import (
    file_fingerprint,
    source_fingerprints,
    table_fingerprint,
    token_key,
    tokenizer_fingerprint,
)
from ludwig_peft_plugin.data.lengths import LengthLimits
from ludwig_peft_plugin.data.sources import DataSources
from ludwig_peft_plugin.errors import DataError

TABLE = pd.DataFrame({"text": ["a", "b", "c"], "number": [1, 2, 3], "mixed": ["x", 1.5, None]})


def test_equal_tables():
    assert table_fingerprint(TABLE) == table_fingerprint(TABLE.copy(deep=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.assign(text=["a", "b", "d"]),
        lambda frame: frame.assign(text=["ab", "", "c"]),
        lambda frame: frame.assign(text=["a", "b", None]),
        lambda frame: frame.assign(number=[1, 2, 4]),
        lambda frame: frame.assign(number=[1.0, 2.0, 3.0]),
        lambda frame: frame.assign(mixed=["x", 1.5, "None"]),
        lambda frame: frame.assign(mixed=["x", "1.5", None]),
        lambda frame: frame[::-1],
        lambda frame: frame[:2],
        lambda frame: frame.set_index(np.array([5, 6, 7])),
        lambda frame: frame.rename(columns={"text": "texts"}),
        lambda frame: frame[["number", "text", "mixed"]],
        lambda frame: frame.assign(more=1),
    ],
)
def test_other_tables(change):
    assert table_fingerprint(change(TABLE)) != table_fingerprint(TABLE)


def test_tables_of_many_types():
    frame = pd.DataFrame(
        {
            "day": pd.to_datetime(["2024-01-01", None]),
            "zone": pd.to_datetime(["2024-01-01", "2024-01-02"]).tz_localize("UTC"),
            "kind": pd.Categorical(["a", "b"]),
            "whole": pd.array([1, None], dtype="Int64"),
            "truth": [True, False],
            "half": pd.Series(["\ud83d", "x"], dtype=object),
            "list": [[1, 2], {"a": 1}],
        }
    )
    assert table_fingerprint(frame) == table_fingerprint(frame.copy())
    assert table_fingerprint(frame.assign(list=[[1, 3], {"a": 1}])) != table_fingerprint(frame)
    assert table_fingerprint(frame.assign(kind=pd.Categorical(["a", "a"]))) != table_fingerprint(frame)


def test_every_block_of_a_long_table(monkeypatch):
    from ludwig_peft_plugin.data import fingerprints

    monkeypatch.setattr(fingerprints, "_ROWS", 4)
    seen = set()
    for row in range(10):
        frame = pd.DataFrame({"text": [str(number) for number in range(10)]})
        frame.loc[row, "text"] = "x"
        seen.add(table_fingerprint(frame))
    assert len(seen) == 10


def test_a_file_by_content_and_not_by_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        TABLE.to_csv(tmp_path / name / "data.csv", index=False)
    first, tables = source_fingerprints(DataSources(dataset=str(tmp_path / "one" / "data.csv")))
    assert tables is None, "a local file is hashed without reading it as a table"
    assert source_fingerprints(DataSources(dataset=tmp_path / "two" / "data.csv"))[0] == first
    shutil.copy(tmp_path / "one" / "data.csv", tmp_path / "data.tsv")
    assert source_fingerprints(DataSources(dataset=str(tmp_path / "data.tsv")))[0] != first, "it is read differently"
    read_as = DataSources(dataset=str(tmp_path / "one" / "data.csv"), data_format="tsv")
    assert source_fingerprints(read_as)[0] != first
    with open(tmp_path / "one" / "data.csv", "a") as stream:
        stream.write("d,4,y\n")
    assert source_fingerprints(DataSources(dataset=str(tmp_path / "one" / "data.csv")))[0] != first


def test_a_folder_of_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a").write_text("1")
        (tmp_path / name / "sub" / "b").write_text("2")
    assert file_fingerprint(tmp_path / "one") == file_fingerprint(tmp_path / "two")
    (tmp_path / "two" / "sub" / "b").rename(tmp_path / "two" / "sub" / "c")
    assert file_fingerprint(tmp_path / "one") != file_fingerprint(tmp_path / "two")


def test_sources_by_option(tmp_path):
    path = str(tmp_path / "data.csv")
    TABLE.to_csv(path, index=False)
    one, _ = source_fingerprints(DataSources(training_set=path, test_set=path))
    assert list(one) == ["training_set", "test_set"]
    mixed, tables = source_fingerprints(DataSources(training_set=TABLE, test_set=path))
    assert list(tables) == ["training_set", "test_set"]
    assert mixed["test_set"] != one["test_set"]
    with pytest.raises(DataError, match="there is no file"):
        source_fingerprints(DataSources(dataset=path + "x"))


def test_a_tokenizer_by_content_and_not_by_place(base_model, tokenizer_of, kind, tmp_path):
    folder = base_model(kind)
    shutil.copytree(folder, tmp_path / "copy")
    own, other = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "copy"))
    assert tokenizer_fingerprint(own) == tokenizer_fingerprint(other) is not None
    for tokenizer in (own, other):
        tokenizer.pad_token = tokenizer.eos_token
    other("some text", padding="max_length", truncation=True, max_length=5)
    assert tokenizer_fingerprint(own) == tokenizer_fingerprint(other), "how it was last called is no part of it"
    other.add_tokens(["added"])
    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(other)
    other = copy.deepcopy(own)
    other.eos_token = other.convert_ids_to_tokens(10)
    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(other)


def test_every_kind_of_tokenizer_has_its_own(tokenizer_of, byte_level_kinds):
    prints = [tokenizer_fingerprint(tokenizer_of(kind)) for kind in byte_level_kinds]
    assert len(set(prints)) == len(byte_level_kinds)


def test_a_tokenizer_that_cannot_be_written(tokenizer_of, rendered_config, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer_of("slow, automatic eos"))

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(type(tokenizer), "save_pretrained", refuse)
    limits = LengthLimits(None, None, 10, 10)
    assert token_key({"dataset": "x"}, tokenizer, rendered_config, {}, limits, 1) is None


CHANGES = {
    "data": lambda parts: parts | {"data": {"dataset": "b"}},
    "option": lambda parts: parts | {"data": {"training_set": "a"}},
    "seed": lambda parts: parts | {"seed": 2},
    "split": lambda parts: parts | {"preprocessing": {"split": {"type": "fixed", "column": "split"}}},
    "sample": lambda parts: parts | {"preprocessing": {"sample_ratio": 0.5}},
    "prompt limit": lambda parts: parts | {"limits": LengthLimits(5, None, 10, 20)},
    "row limit": lambda parts: parts | {"limits": LengthLimits(None, None, 11, 20)},
    "context": lambda parts: parts | {"limits": LengthLimits(None, None, 10, 21)},
    "overlong": lambda parts: parts | {"limits": LengthLimits(None, None, 10, 20, "drop")},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_part_changes_the_key(tokenizer_of, rendered_config, change):
    parts = {
        "data": {"dataset": "a"},
        "tokenizer": tokenizer_of("eos only"),
        "config": rendered_config,
        "preprocessing": {},
        "limits": LengthLimits(None, None, 10, 20),
        "seed": 1,
    }
    assert token_key(**parts) == token_key(**copy.deepcopy(parts))
    assert token_key(**change(parts)) != token_key(**parts)


def test_versions_and_features_change_the_key(tokenizer_of, rendered_config, monkeypatch):
    from ludwig_peft_plugin.data import fingerprints

    def key(config):
        return token_key({}, tokenizer_of("eos only"), config, {}, LengthLimits(None, None, 10, 20), 1)

    keys = [key(rendered_config), key(rendered_config | {"prompt": {"template": "{instruction}"}})]
    for side, name, value in (
        ("input_features", "lowercase", True),
        ("input_features", "fill_value", "nothing"),
        ("output_features", "missing_value_strategy", "fill_with_mode"),
    ):
        config = copy.deepcopy(rendered_config)
        config[side][0]["preprocessing"][name] = value
        keys.append(key(config))
    monkeypatch.setattr(fingerprints, "FORMAT", 999)
    keys.append(key(rendered_config))
    monkeypatch.setattr(fingerprints.metadata, "version", lambda library: f"{library} 9")
    keys.append(key(rendered_config))
    assert len(set(keys)) == 7
