"""Small bases, configs for them, and estimators of these."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.model.base_model import ASSETS

SHAPE = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Bases:
    """Makes folders of bases, with random weights or with a config.json alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def llama(self, layers: int = 3) -> str:
        """Return the folder of a tiny random Llama."""
        path = self._folder / f"llama-{layers}"
        if not path.is_dir():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})).save_pretrained(path)
            for tokenizer in (ASSETS / "tiny-llama-python").glob("tokenizer*"):
                shutil.copy(tokenizer, path)
        return str(path)

    def described(self, name: str, config: dict[str, Any]) -> str:
        """Return a folder with a config.json and no weights worth the name."""
        path = self._folder / name
        if not path.is_dir():
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
            (path / "model.safetensors").touch()
        return str(path)

    def llama_8b(self) -> str:
        """Return a folder that describes Llama 3.1 8B."""
        config = {
            **SHAPE,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        }
        return self.described("llama-8b", config)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def make_config(registered: None, bases: Bases) -> Any:
    """A function that returns the validated config of a small text-to-text task."""
    from ludwig.schema.model_types.base import ModelConfig

    def make(base: str | None = None, adapter: Any = "lora", length: int = 32, **sections: Any) -> Any:
        trainer = {"type": "finetune", "batch_size": 4, **sections.pop("trainer", {})}
        if isinstance(adapter, str):
            adapter = {"type": adapter}
        return ModelConfig.from_dict(
            {
                "model_type": "llm",
                "base_model": base or bases.llama(),
                "input_features": [{"name": "prompt", "type": "text"}],
                "output_features": [{"name": "output", "type": "text"}],
                "preprocessing": {"global_max_sequence_length": length},
                "generation": {"max_new_tokens": 8},
                "adapter": adapter,
                "trainer": trainer,
                **sections,
            }
        )

    return make


@pytest.fixture(autouse=True)
def quiet_bitsandbytes() -> Iterator[None]:
    """Leave out its remark about each 8-bit product."""
    level = logging.getLogger("bitsandbytes").level
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield
    logging.getLogger("bitsandbytes").setLevel(level)
