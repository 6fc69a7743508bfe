"""Encoders with adapters through Ludwig: training, saving, loading, predicting, evaluating, resuming."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed_runs import KillAt, Killed

# Ludwig warns about keys that it adds to encoder sections itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

Make = Callable[..., dict[str, Any]]
QUIET = {"skip_save_processed_input": True, "skip_save_log": True}


def encoder_of(model: Any, name: str = "code") -> Any:
    return model.model.input_features.get(name).encoder_obj


def probabilities(model: Any, table: pd.DataFrame) -> np.ndarray:
    predictions, _ = model.predict(dataset=table, skip_save_predictions=True)
    columns = [predictions["area_probabilities_io"], predictions["size_predictions"]]
    return np.stack([column.to_numpy(dtype=np.float64) for column in columns])


@pytest.fixture(scope="module")
def trained(make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a LoRA encoder, trained on text, category and number columns, and where it was saved."""
    folder = tmp_path_factory.mktemp("trained")
    model = new_model(
        make_config({"type": "lora", "r": 4, "target_modules": "all-linear", "modules_to_save": ["pooler"]})
    )
    output = model.train(dataset=table, output_directory=str(folder), **QUIET).output_directory
    return model, Path(output) / "model"


def test_only_the_adapter_and_the_heads_are_trained(trained: Any, text_model: Any) -> None:
    model, _ = trained
    inside = {name for name, p in encoder_of(model).named_parameters() if p.requires_grad}
    assert inside
    assert all("lora_" in name or "modules_to_save" in name for name in inside)
    assert any("modules_to_save" in name for name in inside)
    others = [p for name, p in model.model.named_parameters() if ".encoder_obj.transformer." not in name]
    assert others
    assert all(p.requires_grad for p in others)


def test_the_base_is_bit_identical_after_training(trained: Any, text_model: Any) -> None:
    model, _ = trained
    adapted = encoder_of(model).transformer.module
    lora = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(p.abs().sum() > 0 for p in lora)
    base = copy.deepcopy(adapted).cpu().get_base_model()
    after = {
        name.replace(".base_layer", "").replace(".original_module", ""): t for name, t in base.state_dict().items()
    }
    for name, tensor in text_model("bert").state_dict().items():
        assert torch.equal(after[name], tensor), name
    pooler = base.pooler.modules_to_save["default"].dense.weight
    assert not torch.equal(pooler, after["pooler.dense.weight"])


def test_a_loaded_model_predicts_the_same(trained: Any, table: pd.DataFrame) -> None:
    from ludwig.api import LudwigModel

    model, folder = trained
    loaded = LudwigModel.load(str(folder), logging_level=logging.ERROR)
    expected = probabilities(model, table)
    np.testing.assert_array_equal(probabilities(loaded, table), expected)
    adapted = encoder_of(loaded).transformer.module
    with adapted.disable_adapter():
        assert np.abs(probabilities(loaded, table) - expected).max() > 1e-4
    first, _, _ = model.evaluate(dataset=table, skip_save_eval_stats=True)
    second, _, _ = loaded.evaluate(dataset=table, skip_save_eval_stats=True)
    assert second["area"]["loss"] == first["area"]["loss"]


def test_checkpoints_hold_no_frozen_weight(trained: Any) -> None:
    from safetensors import safe_open

    _, folder = trained
    (weights,) = (folder / "training_checkpoints").glob("latest*.safetensors")
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    assert any("lora_A" in name for name in names)
    assert not any("base_layer" in name for name in names)


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 4, "dropout": 0.1}, {"type": "bitfit"}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    adapter: dict[str, Any], make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    config = make_config(adapter, reduce_output="mean")
    config["trainer"] |= {"epochs": 4}
    whole = new_model(copy.deepcopy(config))
    whole.train(dataset=table, output_directory=str(tmp_path / "whole"), **QUIET)
    stopped = new_model(copy.deepcopy(config), callbacks=[KillAt(epoch=2)])
    with pytest.raises(Killed):
        stopped.train(dataset=table, output_directory=str(tmp_path / "parts"), **QUIET)
    (experiment,) = (tmp_path / "parts").iterdir()
    resumed = new_model(copy.deepcopy(config))
    resumed.train(dataset=table, model_resume_path=str(experiment), **QUIET)
    np.testing.assert_allclose(probabilities(resumed, table), probabilities(whole, table), atol=1e-6)


def test_two_texts_and_a_tied_one_train(make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path) -> None:
    from ludwig.api import LudwigModel

    config = make_config("lora")
    text = config["input_features"][0]
    config["defaults"] = {"text": {"encoder": text.pop("encoder") | {"adapter": {"type": "dora", "r": 2}}}}
    config["input_features"] += [
        {"name": "other", "column": "code", "type": "text"},
        {"name": "same", "column": "code", "type": "text", "tied": "code"},
    ]
    model = new_model(config)
    output = model.train(dataset=table, output_directory=str(tmp_path), **QUIET).output_directory
    assert encoder_of(model, "same") is encoder_of(model)
    assert encoder_of(model, "other") is not encoder_of(model)
    for name in ("code", "other"):
        assert any("lora_magnitude" in key for key, p in encoder_of(model, name).named_parameters() if p.requires_grad)
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    np.testing.assert_array_equal(probabilities(loaded, table), probabilities(model, table))


def test_loraplus_gives_the_second_matrices_their_own_rate(
    make_config: Make, new_model: Any, table: pd.DataFrame
) -> None:
    from ludwig.modules import optimization_modules

    model = new_model(make_config({"type": "lora", "loraplus_lr_ratio": 8.0}))
    assert optimization_modules._get_loraplus_lr_ratio(type("Model", (), {"config_obj": model.config_obj})) == 8.0
    plain = new_model(make_config("lora"))
    assert optimization_modules._get_loraplus_lr_ratio(type("Model", (), {"config_obj": plain.config_obj})) is None


def test_auto_transformer_takes_an_adapter(
    make_config: Make, encoder_folder: Any, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig.api import LudwigModel

    path = encoder_folder("distilbert")
    adapter = {"type": "lora", "r": 2}
    model = new_model(make_config(adapter, kind="auto_transformer", pretrained_model_name_or_path=path))
    output = model.train(dataset=table, output_directory=str(tmp_path), **QUIET).output_directory
    trained = {key for key, p in encoder_of(model).named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in key for key in trained)
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    np.testing.assert_array_equal(probabilities(loaded, table), probabilities(model, table))


def test_an_adapter_that_fits_no_module_stops_before_training(
    make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig_peft_plugin.errors import AdapterError

    model = new_model(make_config({"type": "lora", "target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match=r"input feature 'code', encoder 'bert': .*no module is called q_proj"):
        model.train(dataset=table, output_directory=str(tmp_path), **QUIET)


def test_explanations_attribute_to_the_embeddings(trained: Any) -> None:
    model, _ = trained
    encoder = encoder_of(model)
    assert encoder.get_embedding_layer() is encoder.transformer.module.get_base_model().embeddings
