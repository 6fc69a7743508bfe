"""A tiny random Llama on disk, and configs of which only what loading reads is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.config.quantization import QuantizationConfig


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bfloat16 Llama with untied embeddings, in several files."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def base_config(llama_folder: Path) -> Callable[..., Any]:
    """Return a function that makes a config: `base_config(folder, quantization={...}, adapter=None, ...)`."""

    def make(folder: Path | str = llama_folder, quantization: Any = None, **values: Any) -> SimpleNamespace:
        config = {
            "base_model": str(folder),
            "precision": "float32",
            "trust_remote_code": False,
            "model_parameters": None,
            "trainer": SimpleNamespace(type="finetune"),
            "adapter": SimpleNamespace(type="lora"),
            "adapters": None,
            "quantization": QuantizationConfig.model_validate(quantization) if quantization else None,
        }
        return SimpleNamespace(**{**config, **values})

    return make
