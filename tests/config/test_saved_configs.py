"""Configs as stock Ludwig 0.17.10 saves them, every default in them, load and stay what they were."""

import json
from pathlib import Path
from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.base import ModelConfig

HERE = Path(__file__).parent
SAVED = {
    "lora": HERE.parent / "fixtures" / "stock_model" / "model_hyperparameters.json",
    "ia3": HERE / "saved" / "stock_ia3.json",
    "none": HERE / "saved" / "stock_none.json",
}


def saved(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(SAVED[name].read_text())
    return config


@pytest.mark.parametrize("name", SAVED)
def test_stock_config_loads(name: str) -> None:
    before = saved(name)
    after = json.loads(json.dumps(ModelConfig.from_dict(saved(name)).to_dict()))
    for section in ("trainer", "generation", "prompt", "quantization", "adapters", "model_parameters"):
        assert (after[section] is None) == (before[section] is None)
        assert (before[section] or {}).items() <= (after[section] or {}).items()  # the plugin has more options
    assert (after["adapter"] or {}).get("r") == (before["adapter"] or {}).get("r")


@pytest.mark.parametrize("name", SAVED)
def test_stock_config_of_an_older_version_loads(name: str) -> None:
    assert ModelConfig.from_dict(saved(name) | {"ludwig_version": "0.17.0"}).model_type == "llm"


@pytest.mark.parametrize("name", SAVED)
def test_stock_config_survives_being_saved_again(name: str) -> None:
    once = ModelConfig.from_dict(saved(name)).to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(once))).to_dict() == once


def test_quantised_stock_config_keeps_its_compute_dtype() -> None:
    config = saved("lora")
    stock = {"backend": "bitsandbytes", "mode": None, "qat": False, "bits": 4, "bnb_4bit_compute_dtype": "float16"}
    config["quantization"] = stock
    assert ModelConfig.from_dict(config).quantization.bnb_4bit_compute_dtype == "float16"


def test_mistakes_in_a_saved_config_are_still_found() -> None:
    config = saved("lora")
    config["adapter"]["rr"] = 4
    config["trainer"]["epochs"] = -1
    with pytest.raises(ConfigValidationError, match=r"adapter\.rr: unknown option[\s\S]*trainer\.epochs: -1"):
        ModelConfig.from_dict(config)
