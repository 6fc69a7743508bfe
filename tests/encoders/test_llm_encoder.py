"""The text encoder `llm`: its adapter is put on, trained alone, saved and loaded, beside other features."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")


def test_the_adapter_of_an_llm_encoder_trains_alone_and_is_saved_alone(
    make_config: Callable[..., dict[str, Any]], new_model: Any, text_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig.api import LudwigModel
    from safetensors import safe_open

    config = make_config({"type": "lora", "r": 2, "target_modules": "all-linear"}, kind="llm")
    config["combiner"] = {"type": "sequence_concat", "reduce_output": "mean"}  # the encoder gives a vector a token
    config["input_features"].reverse()  # Ludwig lost the weights of the features before the encoder
    config["input_features"][0]["encoder"] = {"type": "dense"}
    model = new_model(config)
    output = model.train(dataset=table, output_directory=str(tmp_path), skip_save_processed_input=True).output_directory
    encoder = model.model.input_features.get("code").encoder_obj
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    with safe_open(f"{output}/model/model_weights.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name for name in names if ".encoder_obj.model." in name} == {
        name for name in names if "code" in name and "lora_" in name
    }
    assert any("lines" in name for name in names)
    after = encoder.model.get_base_model().state_dict()
    for name, tensor in text_model("llm").state_dict().items():
        key = name if name in after else f"{name.removesuffix('.weight')}.base_layer.weight"
        assert torch.equal(after[key].cpu(), tensor), name
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    first, _ = model.predict(dataset=table, skip_save_predictions=True)
    second, _ = loaded.predict(dataset=table, skip_save_predictions=True)
    np.testing.assert_array_equal(first["area_probabilities_io"], second["area_probabilities_io"])
