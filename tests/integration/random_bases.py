"""Bases of random weights with the shipped tokenizer, in folders, and rows of random tokens for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.model.base_model import ASSETS

VOCABULARY, END = 512, 0  # the end is that of the shipped tokenizer
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": END,
}


class Rows(TokenDataset):
    """Rows of random tokens, the first four of which are the prompt, each of one of two tasks."""

    def __init__(self, lengths: tuple[int, ...], tasks: bool) -> None:
        generator = np.random.default_rng(len(lengths))
        rows = [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]
        frame = pd.DataFrame({"prompt": [""] * len(rows), "output": [""] * len(rows)})
        prompts = np.full(len(rows), 4, dtype=np.int32)
        of_rows = np.arange(len(rows), dtype=np.int32) % 2 if tasks else None
        super().__init__(Ragged.from_lists(rows), prompts, frame, has_targets=True, pad_id=END, tasks=of_rows)
        self.numbers = np.arange(len(rows))


def write_bases(folder: Path) -> dict[str, str]:
    """Write a Qwen2, which has biases, and a Llama for what needs one, below `folder`; return where, by those names."""
    found = {}
    for name, cls, config in (("qwen2", Qwen2ForCausalLM, Qwen2Config), ("llama", LlamaForCausalLM, LlamaConfig)):
        torch.manual_seed(0)
        model = cls(config(**SHAPE))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start as ones and biases as zeros, where a mistake would not show
                    parameter += 0.1 * torch.randn_like(parameter)
        _write(model, folder / name)
        found[name] = str(folder / name)
    return found


def write_llama_175m(folder: Path) -> None:
    """Write a Llama of 175 million parameters, large enough for its memory to be measured."""
    shape = {
        **SHAPE,
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    }
    torch.manual_seed(0)
    _write(LlamaForCausalLM(LlamaConfig(**shape)), folder)


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in bfloat16, with the shipped tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for tokenizer in (ASSETS / "tiny-llama-python").glob("tokenizer*"):
        shutil.copy(tokenizer, folder)
