"""Fixtures of the data tests: tokenizers of every kind, small base models, and configs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXTS = [
    "def add(a, b):\n    return a + b",
    "Write a function that adds two numbers.",
    "### Instruction: ### Input: ### Response: ",
    "for item in items:\n    print(item, 'naïve café €')",
] * 3

SPECIALS = ["<unk>", "<pad>", "<s>", "</s>"]


def _byte_level_bpe(after: processors.TemplateProcessing | None = None) -> Tokenizer:
    """A byte-level BPE whose special tokens are there in every kind, so that ordinary tokens have the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if after is not None:
        tokenizer.post_processor = after
    return tokenizer


def _around(template: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 3)])


def _metaspace() -> Tokenizer:
    """Pieces that start with a space mark, bos in front: the shape of sentencepiece models such as Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *pieces], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _around("<s> $A")
    return tokenizer


def _fast(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **tokens)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "eos only": lambda: _fast(_byte_level_bpe()),
    "pad is eos": lambda: _fast(_byte_level_bpe(), pad_token="</s>"),
    "own pad": lambda: _fast(_byte_level_bpe(), pad_token="<pad>", unk_token="<unk>"),
    "bos not added": lambda: _fast(_byte_level_bpe(), bos_token="<s>", pad_token="<pad>"),
    "automatic bos": lambda: _fast(_byte_level_bpe(_around("<s> $A")), bos_token="<s>"),
    "automatic eos": lambda: _fast(_byte_level_bpe(_around("$A </s>"))),
    "automatic bos and eos": lambda: _fast(_byte_level_bpe(_around("<s> $A </s>")), bos_token="<s>", pad_token="<pad>"),
    "metaspace": lambda: _fast(_metaspace(), bos_token="<s>", unk_token="<unk>"),
    "slow, automatic eos": ByT5Tokenizer,
}
ADDS_BOS = ("automatic bos", "automatic bos and eos", "metaspace")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own: tokens are found again by content, and tests share theirs."""
    folder = tmp_path_factory.mktemp("ludwig_cache")
    monkeypatch.setenv("LUDWIG_CACHE", str(folder))
    return folder


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tokenizer."""
    return str(request.param)


@pytest.fixture(params=ADDS_BOS)
def bos_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tokenizer that puts bos in front of a text by itself."""
    return str(request.param)


@pytest.fixture(scope="session")
def byte_level_kinds() -> list[str]:
    """The kinds with the same ids for ordinary text."""
    return [kind for kind in KINDS if kind not in ("metaspace", "slow, automatic eos")]


def expected_row(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str | None = None) -> tuple[list[int], int]:
    """Return a row's tokens and how many are prompt, from the tokenizer's plain calls."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begins = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id is not None
    front = [tokenizer.bos_token_id] if begins else []
    end = [] if target is None else [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return front + ids + end, len(front + ids)


@pytest.fixture(scope="session")
def row_of() -> Callable[..., tuple[list[int], int]]:
    """See `expected_row`."""
    return expected_row


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerBase]:
    """Return a tokenizer of a kind, made once."""
    made: dict[str, PreTrainedTokenizerBase] = {}

    def make(kind: str) -> PreTrainedTokenizerBase:
        if kind not in made:
            made[kind] = KINDS[kind]()
        return made[kind]

    return make


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_of: Any) -> Callable[..., str]:
    """Return the folder of a small base model with a tokenizer of a kind and a context length."""
    folders: dict[tuple[str, int], str] = {}

    def make(kind: str = "eos only", context: int = 256) -> str:
        if (kind, context) not in folders:
            folder = tmp_path_factory.mktemp("base_model")
            tokenizer_of(kind).save_pretrained(folder)
            config = LlamaConfig(
                vocab_size=1000,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=context,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
            folders[kind, context] = str(folder)
        return folders[kind, context]

    return make


@dataclass
class Config:
    """What preprocessing needs of Ludwig's config object."""

    section: dict[str, Any]
    base_model: str
    trust_remote_code: bool = False
    model_parameters: None = None

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.section)


@pytest.fixture(scope="session")
def rendered_config(base_model: Any) -> dict[str, Any]:
    """The full dict of an LLM config as Ludwig renders it."""
    from ludwig.schema.model_types.base import ModelConfig

    return ModelConfig.from_dict(
        {
            "model_type": "llm",
            "base_model": base_model(),
            "prompt": {"template": "### Instruction: {instruction}\n### Input: {input}\n### Response: "},
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "adapter": {"type": "lora"},
            "trainer": {"type": "finetune"},
            "generation": {"max_new_tokens": 20},
        }
    ).to_dict()


@pytest.fixture
def make_config(rendered_config: dict[str, Any], base_model: Any) -> Callable[..., Config]:
    """Return a config for a base model of a kind; keywords replace or add (dicts are merged) top-level entries."""

    def make(kind: str = "eos only", context: int = 256, **changes: Any) -> Config:
        section = copy.deepcopy(rendered_config)
        for name, value in changes.items():
            section[name] = {**section[name], **value} if isinstance(value, dict) and name in section else value
        return Config(section, base_model(kind, context))

    return make


@pytest.fixture
def instructions() -> pd.DataFrame:
    """Forty rows in the shape of the shipped data, each of its own text."""
    return pd.DataFrame(
        {
            "instruction": [f"Write function number {row}." for row in range(40)],
            "input": ["" if row % 3 else f"argument {row}" for row in range(40)],
            "output": [f"def f{row}():\n    return {row}" for row in range(40)],
            "split": [0] * 30 + [1] * 4 + [2] * 6,
        }
    )


def unused(*_args: Any, **_kwargs: Any) -> None:
    """Stand for Ludwig's own function where it must not be called."""
    raise AssertionError("Ludwig's original must not be called for text to text")


@pytest.fixture(scope="session")
def train() -> Callable[..., Any]:
    """Preprocess for training: three datasets and the metadata."""
    from ludwig_peft_plugin.data.preprocess import preprocess_for_training

    return functools.partial(preprocess_for_training, original=unused)


@pytest.fixture(scope="session")
def predict() -> Callable[..., Any]:
    """Preprocess for prediction: the dataset alone."""
    from ludwig_peft_plugin.data.preprocess import preprocess_for_prediction

    def run(config: Any, dataset: Any = None, metadata: Any = None, **kwargs: Any) -> Any:
        return preprocess_for_prediction(config, dataset, metadata, original=unused, **kwargs)[0]

    return run


def prompt_text(row: Any) -> str:
    """Return the prompt of the template in `rendered_config`."""
    return f"### Instruction: {row['instruction']}\n### Input: {row['input']}\n### Response: "


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., str]:
    """See `prompt_text`."""
    return prompt_text


@pytest.fixture(scope="session")
def check_rows() -> Callable[..., None]:
    """Compare a dataset with one plain tokenizer call a row."""

    def check(dataset: Any, frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, targets: bool = True) -> None:
        assert len(dataset) == len(frame)
        for index, (_, row) in enumerate(frame.iterrows()):
            tokens, prompt = expected_row(tokenizer, prompt_text(row), row["output"] if targets else None)
            assert dataset.input_ids[index].tolist() == tokens
            assert dataset.prompt_lengths[index] == prompt

    return check
