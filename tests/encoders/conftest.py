"""Tiny random text encoders on disk, a table with text, category and number columns, and configs that use them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

WORDS = ["open", "close", "read", "write", "file", "socket", "parse", "tree", "token", "number", "date", "time", "key"]
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
# Wide enough for the default options of every method.
SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words; the padding is token 2, which is what Ludwig masks."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=24,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    ).save_pretrained(folder)


def make_model(kind: str) -> Any:
    """Return a random model of an architecture, the same at each call."""
    torch.manual_seed(0)
    common = {**SIZES, **HEADS, "pad_token_id": 2, "max_position_embeddings": 32}
    match kind:
        case "bert":
            return BertModel(BertConfig(**common))
        case "roberta":
            return RobertaModel(RobertaConfig(**common))
        case "albert":
            return AlbertModel(AlbertConfig(**common, embedding_size=64))
        case "distilbert":
            return DistilBertModel(
                DistilBertConfig(
                    vocab_size=32,
                    dim=64,
                    n_layers=2,
                    n_heads=2,
                    hidden_dim=128,
                    pad_token_id=2,
                    max_position_embeddings=32,
                )
            )
        case _:
            return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=1, bos_token_id=0, eos_token_id=1))


@pytest.fixture(scope="session")
def text_model() -> Callable[[str], Any]:
    """Return a function that makes a tiny random model of an architecture, the same at each call."""
    return make_model


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that gives the folder of a tiny random model of an architecture."""
    made: dict[str, str] = {}

    def folder(kind: str = "bert") -> str:
        if kind not in made:
            path = tmp_path_factory.mktemp(f"tiny-{kind}")
            make_model(kind).save_pretrained(path)
            save_tokenizer(path)
            made[kind] = str(path)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """48 rows: 32 to train, 8 to validate, 8 to test; the text and the category decide the targets."""
    chooser = random.Random(0)
    rows = []
    for index in range(48):
        words = [chooser.choice(WORDS) for _ in range(3 + index % 6)]
        kind = chooser.choice(["function", "method", "class"])
        label = "io" if set(words) & {"open", "read", "write", "file"} else "other"
        rows.append((" ".join(words), kind, index % 7, label, len(words) + (kind == "class")))
    frame = pd.DataFrame(rows, columns=["code", "kind", "lines", "area", "size"])
    return frame.assign(split=[0] * 32 + [1] * 8 + [2] * 8)


@pytest.fixture(scope="session")
def make_config(registered: None, encoder_folder: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a config: text, category and number columns to a category and a number."""

    def make(adapter: Any = None, kind: str = "bert", **encoder: Any) -> dict[str, Any]:
        option = "base_model" if kind == "llm" else "pretrained_model_name_or_path"
        section = {"type": kind, **({} if option in encoder else {option: encoder_folder(kind)}), **encoder}
        if adapter is not None:
            section["adapter"] = adapter
        return {
            "input_features": [
                {"name": "code", "type": "text", "encoder": section},
                {"name": "kind", "type": "category", "encoder": {"type": "dense"}},
                {"name": "lines", "type": "number"},
            ],
            "output_features": [{"name": "area", "type": "category"}, {"name": "size", "type": "number"}],
            "combiner": {"type": "concat"},
            "preprocessing": {"split": {"type": "fixed"}},
            "trainer": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
            "backend": {"type": "local"},
        }

    return make


@pytest.fixture(scope="session")
def new_model(registered: None) -> Callable[[Any], Any]:
    """Return a function that makes a LudwigModel of a config."""
    from ludwig.api import LudwigModel

    def make(config: Any, **arguments: Any) -> Any:
        return LudwigModel(config, logging_level=logging.ERROR, **arguments)

    return make
