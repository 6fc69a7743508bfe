"""A second run with the same data and settings does not tokenise again, and any other run does."""

import json
import logging
import os

import pytest
from ludwig.backend.base import LocalBackend

from ludwig_peft_plugin.data import tokens, training_tokens
from ludwig_peft_plugin.errors import DataError

FIXED = {"split": {"type": "fixed", "column": "split"}}


@pytest.fixture
def data(instructions, tmp_path):
    """The rows as a file."""
    path = tmp_path / "data" / "rows.csv"
    path.parent.mkdir()
    instructions.to_csv(path, index=False)
    return str(path)


@pytest.fixture
def tokenized(monkeypatch):
    """A list with the texts that were tokenised, other than probes of what a tokenizer adds."""
    texts = []
    for name in ("_encode", "_encode_fast"):
        original = getattr(tokens, name)

        def record(tokenizer, batch, special, original=original):
            texts.extend(text for text in batch if text != tokens._PROBE)
            return original(tokenizer, batch, special)

        monkeypatch.setattr(tokens, name, record)
    return texts


def content(sets):
    return [
        None
        if dataset is None
        else (
            [row.tolist() for row in dataset.input_ids],
            dataset.prompt_lengths.tolist(),
            dataset.frame.to_dict("list"),
            dataset.proc_columns,
            dataset.pad_id,
            dataset.has_targets,
        )
        for dataset in sets[:3]
    ]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("source", ["file", "table", "three files"])
def test_a_second_run_does_not_tokenise(train, make_config, instructions, data, tokenized, caplog, source, kind):
    given = {
        "file": {"dataset": data},
        "table": {"dataset": instructions},
        "three files": {"training_set": data, "validation_set": data, "test_set": data},
    }[source]
    config = make_config(kind, context=600, preprocessing=FIXED if source != "three files" else {})
    first = train(config, **given)
    assert tokenized
    tokenized.clear()
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        second = train(config, **given)
    assert tokenized == []
    (said,) = [message for message in caplog.messages if "earlier run" in message]
    assert said.startswith(f"Rows: {len(first[0])} training, {len(first[1])} validation, {len(first[2])} test.")
    assert os.path.exists(said.rpartition(": ")[2])
    assert content(second) == content(first)
    assert second[3] == first[3]


def test_the_same_as_without_a_cache(train, make_config, data):
    config = make_config(preprocessing=FIXED)
    without = train(config, data, skip_save_processed_input=True)
    kept, again = train(config, data), train(config, data)
    assert content(kept) == content(without) == content(again)
    assert kept[3] == without[3] == again[3]


def test_the_place_of_the_files_does_not_matter(train, make_config, data, tokenized, tmp_path, base_model):
    import shutil

    train(make_config(preprocessing=FIXED), data)
    tokenized.clear()
    shutil.copy(data, tmp_path / "elsewhere.csv")
    config = make_config(preprocessing=FIXED)
    config.base_model = str(shutil.copytree(config.base_model, tmp_path / "model"))
    train(config, str(tmp_path / "elsewhere.csv"))
    assert tokenized == []


def other_template(config):
    config.section["prompt"]["template"] = "### Instruction: {instruction}\n### Input: {input}\n### Answer: "


def other_missing(config):
    config.section["input_features"][0]["preprocessing"]["fill_value"] = "nothing"


def other_limit(config):
    config.section["preprocessing"]["global_max_sequence_length"] = 200


def other_policy(config):
    config.section["preprocessing"]["overlong"] = "drop"


def other_split(config):
    config.section["preprocessing"]["split"] = {"type": "random", "probabilities": [0.5, 0.25, 0.25]}


@pytest.mark.parametrize("change", [other_template, other_missing, other_limit, other_policy, other_split])
def test_other_settings_tokenise_again(train, make_config, data, tokenized, change):
    train(make_config(preprocessing=FIXED), data)
    tokenized.clear()
    config = make_config(preprocessing=FIXED)
    change(config)
    train(config, data)
    assert len(tokenized) >= 80


def test_other_seed_tokenizer_and_data_tokenise_again(train, make_config, instructions, data, tokenized):
    def runs(*args, **kwargs):
        tokenized.clear()
        train(*args, **kwargs)
        return bool(tokenized)

    config = make_config()
    assert runs(config, data)
    assert not runs(config, data)
    assert runs(config, data, random_seed=7)
    assert runs(make_config("automatic bos"), data)
    assert runs(config, instructions)
    assert not runs(config, instructions.copy())
    instructions.loc[5, "output"] += " "
    assert runs(config, instructions)
    instructions.to_csv(data, index=False)
    assert runs(config, data)


def test_what_was_said_about_the_rows_is_said_again(train, make_config, instructions, caplog):
    instructions.loc[[0, 31], "output"] = None
    config = make_config(preprocessing={**FIXED, "global_max_sequence_length": 60, "overlong": "truncate"})
    instructions.loc[2, "output"] = "answer " * 100
    said = []
    for _ in range(2):
        caplog.clear()
        train(config, instructions)
        said.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert said[0] == said[1]
    assert len(said[0]) == 2
    assert "2 of 40 rows of dataset are dropped" in said[0][0]
    assert "target cut: 1" in said[0][1]


def test_errors_are_not_kept(train, make_config, data, tokenized):
    config = make_config(preprocessing={**FIXED, "global_max_sequence_length": 40, "overlong": "error"})
    for _ in range(2):
        with pytest.raises(DataError, match=r"preprocessing\.overlong is error"):
            train(config, data)


def test_a_damaged_file_is_made_again(train, make_config, data, tokenized, caplog, cache_folder):
    config = make_config(preprocessing=FIXED)
    first = train(config, data)
    expected = content(first)
    del first
    (path,) = (cache_folder / "tokens").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    tokenized.clear()
    assert content(train(config, data)) == expected
    assert tokenized
    assert "cannot be used" in caplog.text
    assert path.read_bytes() == whole


def test_nothing_is_left_where_nothing_is_to_be_saved(train, predict, make_config, data, cache_folder, tmp_path):
    from ludwig_peft_plugin.data import spool

    config = make_config(preprocessing=FIXED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "IN_MEMORY", 0)
        patch.setattr(spool.tempfile, "tempdir", str(tmp_path))
        sets = train(config, data, skip_save_processed_input=True)
        predict(config, data)
        predict(config, data, include_outputs=False)
        assert files(tmp_path) == ["data/rows.csv"]
    assert len(sets[0]) == 30
    assert list(cache_folder.iterdir()) == []


def test_large_data_lie_in_files(train, make_config, data, check_rows, instructions, tokenizer_of, monkeypatch):
    from ludwig_peft_plugin.data import build, spool

    monkeypatch.setattr(spool, "IN_MEMORY", 100)
    monkeypatch.setattr(build, "CHUNK", 7)
    config = make_config(preprocessing=FIXED)
    for skip in (True, False):
        sets = train(config, data, skip_save_processed_input=skip)
        for number, dataset in enumerate(sets[:3]):
            check_rows(dataset, instructions[instructions["split"] == number], tokenizer_of("eos only"))
        assert not sets[0].input_ids.values.flags.writeable


def test_kept_tokens_are_used_where_nothing_is_to_be_saved(train, make_config, data, tokenized):
    config = make_config(preprocessing=FIXED)
    train(config, data)
    tokenized.clear()
    train(config, data, skip_save_processed_input=True)
    assert tokenized == []


def test_the_backends_folder(train, make_config, data, cache_folder, tmp_path):
    backend = LocalBackend(cache_dir=str(tmp_path / "own"))
    train(make_config(preprocessing=FIXED), data, backend=backend)
    assert len(files(tmp_path / "own")) == 1
    assert files(cache_folder) == []


def test_a_backends_folder_that_cannot_be_mapped(train, make_config, data, cache_folder, caplog):
    train(make_config(preprocessing=FIXED), data, backend=LocalBackend(cache_dir="s3://bucket/cache"))
    assert "s3://bucket/cache does not allow" in caplog.text
    assert len(files(cache_folder)) == 1


def test_only_the_process_that_leads_writes(train, make_config, data, cache_folder, monkeypatch):
    monkeypatch.setattr(LocalBackend, "is_coordinator", lambda self: False)
    train(make_config(preprocessing=FIXED), data)
    assert files(cache_folder) == []


def test_a_cache_that_cannot_be_written(train, make_config, data, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUDWIG_CACHE", str(tmp_path / "file"))
    assert len(train(make_config(preprocessing=FIXED), data)[0]) == 30
    assert "Tokens are not kept for the next run" in caplog.text


def test_evaluating_a_split_uses_the_tokens_of_training(train, predict, make_config, data, tokenized):
    config = make_config()
    *sets, metadata = train(config, data, random_seed=7)
    tokenized.clear()
    for name, expected in zip(("training", "validation", "test"), sets, strict=True):
        assert content([predict(config, data, metadata, split=name)]) == content([expected])
    assert tokenized == []
    predict(config, data, metadata, split="test", include_outputs=False)
    assert tokenized
    tokenized.clear()
    predict(config, data, metadata)
    assert tokenized


def test_an_empty_split_is_an_error_also_from_the_cache(train, predict, make_config, instructions):
    config = make_config(preprocessing={"split": {"type": "random", "probabilities": [0.5, 0.5, 0.0]}})
    metadata = train(config, instructions)[3]
    with pytest.raises(DataError, match="There are no test rows"):
        predict(config, instructions, metadata, split="test")


def test_prompts_with_retrieved_examples_are_not_kept(train, make_config, instructions, cache_folder):
    config = make_config(
        prompt={
            "template": "{__context__} {__sample__}",
            "task": None,
            "retrieval": {"type": "random", "k": 1, "index_name": None, "model_name": None},
        },
        preprocessing=FIXED,
    )
    config.section["input_features"][0]["column"] = "instruction"
    train(config, instructions)
    assert not (cache_folder / "tokens").exists()


def test_batches_of_kept_tokens(train, make_config, data):
    config = make_config(preprocessing=FIXED)
    train(config, data)
    dataset = train(config, data)[0]
    assert not dataset.input_ids.values.flags.writeable
    with dataset.initialize_batcher(batch_size=4, random_seed=1) as batcher:
        rows = [row for part in batcher.next_batch().micro_batches for row in part.rows.tolist()]
    assert len(rows) == 4


def test_only_the_data_loggers_warnings_are_recorded():
    with training_tokens.recorded_warnings() as warnings:
        logging.getLogger("ludwig_peft_plugin.data.rows").warning("%s rows", 3)
        logging.getLogger("ludwig_peft_plugin.data.rows").info("more")
        logging.getLogger("ludwig_peft_plugin.model").warning("elsewhere")
    logging.getLogger("ludwig_peft_plugin.data.rows").warning("later")
    assert warnings == ["3 rows"]
    assert json.loads(json.dumps(warnings)) == warnings
