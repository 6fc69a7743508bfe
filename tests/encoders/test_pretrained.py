"""Encoders whose adapter starts from a trained one, and the folders that hold such adapters."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ludwig_peft_plugin.encoders.pretrained import save_encoder_adapter
from ludwig_peft_plugin.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

Make = Callable[..., dict[str, Any]]
QUIET = {"skip_save_processed_input": True, "skip_save_log": True}
LORA = {"type": "lora", "r": 4, "alpha": 12, "target_modules": ["query", "value"]}
SECTIONS = {"bert": LORA, "llm": LORA | {"target_modules": ["q_proj", "v_proj"]}}


def adapted(model: Any) -> Any:
    encoder = model.model.input_features.get("code").encoder_obj
    return encoder.transformer.module if hasattr(encoder, "transformer") else encoder.model


def config_of(make_config: Make, adapter: dict[str, Any], kind: str = "bert", **trainer: Any) -> dict[str, Any]:
    config = make_config(adapter, kind=kind)
    config["trainer"] |= {"epochs": 1, **trainer}
    if kind == "llm":
        config["combiner"] = {"type": "sequence_concat", "reduce_output": "mean"}
    return config


@pytest.fixture(scope="module")
def trained(
    make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], str]]:
    """Return a function that gives the section of a kind of encoder, and the folder with the adapter trained by it."""
    made: dict[str, str] = {}

    def train(kind: str) -> tuple[dict[str, Any], str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = new_model(config_of(make_config, SECTIONS[kind], kind))
            model.train(dataset=table, output_directory=str(folder), **QUIET)
            save_encoder_adapter(model, "code", str(folder / "adapter"))
            made[kind] = str(folder / "adapter")
        return SECTIONS[kind], made[kind]

    return train


@pytest.mark.parametrize("kind", ["bert", "llm"])
def test_a_model_starts_from_the_folder_and_is_loaded_without_it(
    kind: str, trained: Any, make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig.api import LudwigModel

    section, folder = trained(kind)
    copied = tmp_path / "adapter"
    shutil.copytree(folder, copied)
    given = section | {"pretrained_adapter_weights": str(copied)}
    model = new_model(config_of(make_config, given, kind, learning_rate=1e-12))
    output = model.train(dataset=table, output_directory=str(tmp_path / "run"), **QUIET).output_directory
    stored = load_file(copied / "adapter_model.safetensors")
    parameters = dict(adapted(model).named_parameters())
    assert any(value.abs().max() > 1e-3 for name, value in stored.items() if "lora_B" in name)
    for name, value in stored.items():
        mine = parameters[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(mine.cpu(), value, rtol=0, atol=1e-8)
    shutil.rmtree(copied)
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    first, _ = model.predict(dataset=table, skip_save_predictions=True)
    second, _ = loaded.predict(dataset=table, skip_save_predictions=True)
    np.testing.assert_array_equal(first["size_predictions"], second["size_predictions"])


def test_peft_alone_loads_the_folder(trained: Any, text_model: Any) -> None:
    from peft import PeftModel

    _, folder = trained("bert")
    theirs = PeftModel.from_pretrained(text_model("bert"), folder)
    parameters = dict(theirs.named_parameters())
    for name, value in load_file(f"{folder}/adapter_model.safetensors").items():
        assert torch.equal(parameters[name.replace(".weight", ".default.weight")], value)


def test_what_cannot_be_saved_alone_is_an_error(
    make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    model = new_model(config_of(make_config, LORA | {"init_lora_weights": "pissa"}, epochs=1))
    model.train(dataset=table, output_directory=str(tmp_path), skip_save_model=True, skip_save_progress=True, **QUIET)
    with pytest.raises(AdapterError, match="init_lora_weights: pissa has changed"):
        save_encoder_adapter(model, "code", "folder")
    with pytest.raises(AdapterError, match=r"'kind' has no encoder with an adapter; those with one: \['code'\]"):
        save_encoder_adapter(model, "kind", "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 16}, r"input feature 'code'.*pretrained_adapter_weights: .* write alpha: 12\."),
        ({"type": "loha", "r": 4, "alpha": 12}, r"is a LORA adapter, not one of type loha"),
        ({"target_modules": ["query"]}, r"6 of its tensors have no place here|does not fit"),
        ({"r": 2}, r"write r: 4"),
    ],
)
def test_a_folder_of_another_adapter_is_refused(
    changes: dict[str, Any],
    message: str,
    trained: Any,
    make_config: Make,
    new_model: Any,
    table: pd.DataFrame,
    tmp_path: Path,
) -> None:
    section, folder = trained("bert")
    given = section | {"pretrained_adapter_weights": folder} | changes
    with pytest.raises(AdapterError, match=message):
        new_model(config_of(make_config, given)).train(dataset=table, output_directory=str(tmp_path), **QUIET)
