"""Every adapter type that fits an encoder, through Ludwig: trained in a mixed model, saved, and loaded exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ludwig.schema.llms.peft import adapter_registry

import ludwig_peft_plugin.adapters  # noqa: F401  (registers the types)
from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.encoders.config import fitting_types
from ludwig_peft_plugin.encoders.saved import plain_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning"),  # of Ludwig
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # of torch, by frod
]

TYPES = [name for name in fitting_types() if issubclass(adapter_registry[name], AdapterConfig)]
SMALL: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 16}}  # has to divide the widths, 64 and 128


def outputs(model: Any, table: pd.DataFrame) -> np.ndarray:
    predictions, _ = model.predict(dataset=table, skip_save_predictions=True)
    columns = [predictions["area_probabilities_io"], predictions["size_predictions"]]
    return np.stack([column.to_numpy(dtype=np.float64) for column in columns])


def test_the_methods_that_work_between_steps_and_on_the_weights_are_among_the_types() -> None:
    assert {"adalora", "adamss", "frod", "psoft", "lora"} <= set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_loaded_model_predicts_the_same(
    name: str,
    make_config: Callable[..., dict[str, Any]],
    new_model: Any,
    table: pd.DataFrame,
    tmp_path: Path,
) -> None:
    from ludwig.api import LudwigModel

    config = make_config({"type": name, **SMALL.get(name, {})}, reduce_output="mean")
    config["trainer"] |= {"epochs": 1, "batch_size": 4, "skip_all_evaluation": True}
    model = new_model(config)
    output = model.train(
        dataset=table, output_directory=str(tmp_path), skip_save_processed_input=True, skip_save_log=True
    ).output_directory
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    expected = outputs(model, table)
    np.testing.assert_array_equal(outputs(loaded, table), expected)
    # The adapter counts: without it the predictions are others.
    adapted = loaded.model.input_features.get("code").encoder_obj.transformer.module
    if hasattr(adapted, "disable_adapter"):
        with adapted.disable_adapter():
            before = outputs(loaded, table)
        assert np.abs(before - expected).max() > 1e-6


def test_names_of_weights_are_those_without_the_adapter() -> None:
    assert plain_name("base_model.model.encoder.layer.0.output.dense.base_layer.weight") == (
        "encoder.layer.0.output.dense.weight"
    )
    assert plain_name("base_model.model.pooler.original_module.dense.bias") == "pooler.dense.bias"
