"""From files and tables to token datasets, through the stand-ins for Ludwig's preprocessing functions."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ludwig.callbacks import Callback
from ludwig.data import preprocessing as stock
from text_runs import text_config

from ludwig_peft_plugin.data.preprocess import is_text_to_text, preprocess_for_prediction, preprocess_for_training
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.errors import DataError

FIXED = {"split": {"type": "fixed", "column": "split"}}
SHIPPED = Path(__file__).parents[2] / "datasets" / "stdlib_instructions.csv"


# The plugin puts its own function in this place when it is registered.
STOCK = getattr(stock.preprocess_for_training, "__wrapped__", stock.preprocess_for_training)


def test_every_kind_of_tokenizer(check_rows, predict, train, make_config, tokenizer_of, kind, instructions):
    config = make_config(kind, context=600, preprocessing=FIXED)
    sets = train(config, instructions)[:3]
    tokenizer = tokenizer_of(kind)
    for number, dataset in enumerate(sets):
        check_rows(dataset, instructions[instructions["split"] == number], tokenizer)
        ends = dataset.input_ids.values[dataset.input_ids.offsets[1:] - 1]
        assert (ends == tokenizer.eos_token_id).all()
        assert dataset.pad_id is not None
    answer = predict(config, instructions, include_outputs=False)
    check_rows(answer, instructions, tokenizer, targets=False)
    assert not answer.has_targets
    assert list(answer.frame) == ["prompt"]


def test_more_rows_than_a_chunk(check_rows, train, make_config, tokenizer_of, instructions, monkeypatch):
    from ludwig_peft_plugin.data import build

    monkeypatch.setattr(build, "CHUNK", 7)
    dataset = train(make_config(preprocessing=FIXED), instructions)[0]
    check_rows(dataset, instructions[:30], tokenizer_of("eos only"))
    assert dataset.frame["output"].tolist() == instructions["output"][:30].tolist()


@pytest.mark.parametrize(
    "preprocessing",
    [
        {},
        FIXED,
        {"sample_ratio": 0.5},
        {"sample_size": 11, "split": {"type": "random", "probabilities": [0.5, 0.5, 0.0]}},
        {"split": {"type": "hash", "column": "instruction", "probabilities": [0.6, 0.2, 0.2]}},
    ],
)
def test_the_same_rows_as_stock_ludwig(train, make_config, instructions, tokenizer_of, preprocessing):
    instructions.loc[[3, 17], "output"] = None
    config = make_config(preprocessing=preprocessing)
    section = config.to_dict()
    theirs = STOCK(
        section,
        instructions.copy(),
        preprocessing_params={**section["preprocessing"], "text": {}},
        skip_save_processed_input=True,
        random_seed=7,
    )
    ours = train(config, instructions, random_seed=7)
    column = section["output_features"][0]["proc_column"]
    for own, other in zip(ours[:3], theirs[:3], strict=True):
        targets = [] if other is None else other.dataset[column]
        decoded = [tokenizer_of("eos only").decode(row, skip_special_tokens=True) for row in targets]
        assert ([] if own is None else own.frame["output"].tolist()) == decoded
    assert sum(len(own) for own in ours[:3] if own is not None) < 40


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_tables_and_separate_sets_agree(train, make_config, instructions, tmp_path, ending):
    write = {
        "csv": lambda frame, path: frame.to_csv(path, index=False),
        "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda frame, path: frame.to_parquet(path),
    }[ending]
    names = ["training_set", "validation_set", "test_set"]
    paths = {name: str(tmp_path / f"{name}.{ending}") for name in names}
    for number, path in enumerate(paths.values()):
        write(instructions[instructions["split"] == number].drop(columns="split"), path)
    whole = str(tmp_path / f"whole.{ending}")
    write(instructions, whole)
    config = make_config(preprocessing=FIXED)
    expected = [dataset.input_ids.values.tolist() for dataset in train(config, instructions)[:3]]
    for given in (
        {"dataset": whole},
        {"dataset": instructions.to_dict("list")},
        paths,
        {name: pd.read_parquet(path) for name, path in paths.items()} if ending == "parquet" else {"dataset": whole},
    ):
        assert [dataset.input_ids.values.tolist() for dataset in train(config, **given)[:3]] == expected
    section = make_config(preprocessing=FIXED, **paths)
    assert [dataset.input_ids.values.tolist() for dataset in train(section)[:3]] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"{name}.{ending}" for name in names), f"whole.{ending}"]
    ), "nothing is written beside the data"


def test_only_a_training_set(train, make_config, instructions):
    training, validation, test, _ = train(make_config(), training_set=instructions)
    assert (len(training), validation, test) == (40, None, None)


def test_one_row(predict, train, make_config, instructions):
    training, validation, test, _ = train(make_config(), instructions[:1])
    assert (len(training), validation, test) == (1, None, None)
    assert len(predict(make_config(), instructions[:1])) == 1


def test_numbers_and_truth_values(train, make_config):
    frame = pd.DataFrame({"instruction": [1, 2, None], "input": [True, False, True], "output": [7, None, 9]})
    dataset = train(make_config(), training_set=frame)[0]
    assert dataset.frame["output"].tolist() == ["7", "9"]
    assert dataset.frame["prompt"].tolist() == [
        "### Instruction: 1\n### Input: True\n### Response: ",
        "### Instruction: \n### Input: True\n### Response: ",
    ]


def test_missing_targets_are_dropped_and_counted(train, make_config, instructions, caplog):
    instructions.loc[[0, 31], "output"] = None
    instructions.loc[[1, 2, 3], "input"] = None
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        sets = train(make_config(preprocessing=FIXED), instructions)[:3]
    assert [len(dataset) for dataset in sets] == [29, 3, 6]
    assert "2 of 40 rows of dataset are dropped: they have no 'output'" in caplog.text
    assert "3 of 40 rows miss a value in a column of the prompt (input)" in caplog.text
    assert "nan" not in "".join(sets[0].frame["prompt"])


def test_integers_stay_integers_in_every_chunk(train, make_config, monkeypatch):
    from ludwig_peft_plugin.data import build

    monkeypatch.setattr(build, "CHUNK", 2)
    frame = pd.DataFrame({"instruction": [1, 2, 3, None], "input": ["", "", "", ""], "output": [1.5, 2, 3, 4]})
    dataset = train(make_config(), training_set=frame)[0]
    assert [text.split("\n")[0] for text in dataset.frame["prompt"]] == [
        "### Instruction: 1",
        "### Instruction: 2",
        "### Instruction: 3",
        "### Instruction: ",
    ]
    assert dataset.frame["output"].tolist() == ["1.5", "2.0", "3.0", "4.0"]


def test_lower_case(train, make_config, instructions):
    config = make_config()
    config.section["input_features"][0]["preprocessing"]["lowercase"] = True
    dataset = train(config, training_set=instructions)[0]
    assert dataset.frame["prompt"][0].startswith("### instruction: write function")
    assert dataset.frame["output"].tolist() == instructions["output"].tolist()


def test_halves_of_characters(train, make_config):
    frame = pd.DataFrame(
        {"instruction": ["\ud83d\ude00", "\ud83d"], "input": ["", ""], "output": ["a", "b"]}, dtype=object
    )
    dataset = train(make_config(), training_set=frame)[0]
    assert "\U0001f600" in dataset.frame["prompt"][0]
    assert "\ufffd" in dataset.frame["prompt"][1]


def test_no_template(train, make_config, tokenizer_of, row_of):
    frame = pd.DataFrame({"prompt": ["a b", None, "c"], "output": ["x", "y", "z"]})
    config = make_config(prompt={"template": None, "task": None})
    dataset = train(config, training_set=frame)[0]
    tokenizer = tokenizer_of("eos only")
    assert dataset.input_ids[0].tolist() == row_of(tokenizer, "a b", "x")[0]
    assert dataset.input_ids[1].tolist() == [tokenizer.eos_token_id, *row_of(tokenizer, "", "y")[0]]


def test_what_is_not_text_to_text_goes_to_ludwig(make_config, instructions):
    def original(*args, **kwargs):
        return "original", args, kwargs

    plain = make_config()
    assert is_text_to_text(plain)
    others = [
        make_config(model_type="ecd"),
        make_config(is_multimodal=True),
        make_config(trainer={"type": "dpo"}),
        make_config(output_features=[{"name": "output", "type": "category"}]),
    ]
    for config in others:
        assert not is_text_to_text(config)
        result = preprocess_for_training(config, instructions, original=original)
        assert result[0] == "original"
        assert result[2]["dataset"] is instructions
        assert preprocess_for_prediction(config, instructions, original=original)[0] == "original"
    assert is_text_to_text(make_config(trainer={"type": "none"}))


def test_the_configs_data_reach_ludwigs_own_functions(make_config, instructions, tmp_path):
    def original(*_, **kwargs):
        return {name: value for name, value in kwargs.items() if value is not None}

    path = str(tmp_path / "data.csv")
    instructions.to_csv(path, index=False)
    config = make_config(trainer={"type": "dpo"}, training_set=path, test_set=path, data_format="csv")
    passed = preprocess_for_training(config, original=original)
    assert (passed["training_set"], passed["test_set"], passed["data_format"]) == (path, path, "csv")
    config = make_config(trainer={"type": "dpo"}, dataset=path)
    assert preprocess_for_prediction(config, None, original=original)["dataset"] == path
    assert preprocess_for_prediction(config, {"a": [1]}, original=original)["dataset"] == {"a": [1]}
    with pytest.raises(DataError, match="there is no file"):
        preprocess_for_training(make_config(trainer={"type": "dpo"}, dataset=path + "x"), original=original)


def test_callbacks_and_progress(predict, train, make_config, instructions):
    class Recorder(Callback):
        def __init__(self):
            self.calls, self.progress = [], []

        def on_build_metadata_start(self, df, mode, **_):
            self.calls.append(("metadata", mode, len(df)))

        def on_build_data_start(self, df, mode, **_):
            self.calls.append(("data", mode, len(df)))

        def on_build_data_end(self, df, mode, **_):
            self.calls.append(("end", mode, len(df)))

        def on_preprocess_progress(self, progress, **_):
            self.progress.append(progress)

    recorder = Recorder()
    train(make_config(preprocessing=FIXED), instructions, callbacks=[recorder])
    assert recorder.calls == [("metadata", "training", 40), ("data", "training", 40), ("end", "training", 40)]
    assert recorder.progress == [0.75, 0.85, 1.0]
    recorder = Recorder()
    predict(make_config(), instructions, callbacks=[recorder], include_outputs=False)
    assert recorder.calls == [("data", "prediction", 40), ("end", "prediction", 40)]
    assert recorder.progress == [1.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda frame: frame.drop(columns="input"), ["prompt.template", "'input'", "dataset", "instruction"]),
        (lambda frame: frame.rename(columns={"output": "outputs"}), ["output_features", "Did you mean 'outputs'"]),
        (lambda frame: frame.assign(output=None), ["'output' of dataset holds nothing in all of its 40 rows"]),
        (lambda frame: frame[:0], ["dataset has no rows"]),
        (lambda frame: frame.assign(split=None), ["No row of dataset can be used"]),
        (lambda frame: frame.assign(split=1), ["leaves no training rows"]),
    ],
)
def test_bad_data(train, make_config, instructions, change, said):
    with pytest.raises(DataError) as error:
        train(make_config(preprocessing=FIXED), change(instructions))
    assert all(words in str(error.value) for words in said), str(error.value)


def test_a_column_that_only_one_set_misses(train, make_config, instructions):
    with pytest.raises(DataError, match=r"'input', which is not in validation_set"):
        train(make_config(), training_set=instructions, validation_set=instructions.drop(columns="input"))
    with pytest.raises(DataError, match=r"'output', which is not in test_set"):
        train(make_config(), training_set=instructions, test_set=instructions.drop(columns="output"))


def test_the_callers_table_is_not_changed(train, make_config, instructions):
    instructions.loc[3, "output"] = None
    before = instructions.copy()
    train(make_config(preprocessing=FIXED), instructions)
    assert instructions.equals(before)


def test_the_shipped_data(check_rows, train, make_config, tokenizer_of):
    config = make_config("pad is eos", context=100_000, preprocessing=FIXED)
    *sets, _ = train(config, str(SHIPPED))
    frame = pd.read_csv(SHIPPED, dtype=str, keep_default_na=False)
    assert sum(map(len, sets)) == len(frame) >= 1_000
    for number, dataset in enumerate(sets):
        rows = frame[frame["split"] == str(number)]
        assert isinstance(dataset, TokenDataset)
        assert dataset.frame["output"].tolist() == rows["output"].tolist()
        check_rows(dataset, rows, tokenizer_of("pad is eos"))
    assert np.mean(sets[0].prompt_lengths) > 10


def test_a_config_object_of_ludwig(train, make_config, instructions, base_model):
    from ludwig.utils.config_utils import get_preprocessing_params

    sections = {"adapter": {"type": "lora"}, "prompt": {"template": "{instruction}"}}
    limited = {"split": {"type": "fixed"}, "global_max_sequence_length": 128}
    config = text_config(base_model(), preprocessing=limited, **sections)
    parameters = get_preprocessing_params(config)
    sets = train(config, instructions, preprocessing_params=parameters)
    assert [len(dataset) for dataset in sets[:3]] == [30, 4, 6]
    column = config.output_features[0].proc_column
    assert sets[2].to_df()[column].tolist() == instructions["output"][34:].tolist()
