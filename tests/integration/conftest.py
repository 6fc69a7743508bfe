"""Small runs of the real pipeline, on the shipped model and rows of the shipped dataset."""

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "### Instruction: {instruction}\n### Input: {input}\n### Response:\n"


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    """40 short rows: 24 to train, 8 to validate, 8 to test."""
    frame = pd.read_csv(ROOT / "datasets" / "stdlib_instructions.csv", keep_default_na=False)
    frame = frame[frame["output"].str.len() + frame["instruction"].str.len() < 260].head(40).reset_index(drop=True)
    return frame.assign(split=[0] * 24 + [1] * 8 + [2] * 8)


@pytest.fixture(scope="session")
def make_config(registered: None) -> Any:
    """Return a function that makes a config: the small LoRA run with the given sections changed."""

    def make(**changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_type": "llm",
            "base_model": "tiny-llama-python",
            "prompt": {"template": TEMPLATE},
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "preprocessing": {"split": {"type": "fixed"}},
            "adapter": {"type": "lora", "r": 4, "dropout": 0.1, "target_modules": "all-linear"},
            "trainer": {"type": "finetune", "epochs": 2, "batch_size": 4, "learning_rate": 5e-3},
            "generation": {"do_sample": False, "max_new_tokens": 12},
            "backend": {"type": "local"},
        }
        return {**config, **changes}

    return make


@pytest.fixture(scope="session")
def new_model(registered: None) -> Any:
    """Return a function that makes a LudwigModel of a config."""
    from ludwig.api import LudwigModel

    def make(config: Any) -> Any:
        return LudwigModel(config, logging_level=logging.ERROR)

    return make


@pytest.fixture(scope="session")
def random_bases(registered: None) -> ModuleType:
    """The module of that name beside this one: rows of random tokens, and bases to write."""
    path = Path(__file__).with_name("random_bases.py")
    spec = importlib.util.spec_from_file_location("integration_random_bases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def llama_175m(random_bases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of 175 million parameters in bfloat16."""
    folder = tmp_path_factory.mktemp("llama-175m")
    random_bases.write_llama_175m(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base_folders(random_bases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of the random bases, by name."""
    found: dict[str, str] = random_bases.write_bases(tmp_path_factory.mktemp("bases"))
    return found
