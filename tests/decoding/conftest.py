"""Small models with random weights, prompts for them, and transformers' own answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

VOCABULARY, END = 61, 7


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return a function that makes a small model of a type, with weights wide enough that its answers differ."""

    def make(model_type: str = "llama", **changes: Any) -> Any:
        torch.manual_seed(1)
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.6,
        }
        config = AutoConfig.for_model(model_type, **(sizes | changes))
        return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(8, VOCABULARY, n).astype(np.int32) for n in (3, 17, 1, 9, 9, 30, 2, 5)]


@pytest.fixture(scope="session")
def settings() -> Callable[..., GenerationConfig]:
    """Return a function that makes generation settings: greedy, 12 tokens at most."""

    def make(**changes: Any) -> GenerationConfig:
        values = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [END], "pad_token_id": END}
        return GenerationConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def one_by_one() -> Callable[..., list[list[int]]]:
    """Return a function that makes transformers' answers, one unpadded prompt at a time."""

    def make(model: Any, prompts: list[np.ndarray], config: GenerationConfig) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            ids = torch.from_numpy(prompt).long()[None]
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            answer = out[0, len(prompt) :].tolist()
            answers.append(answer[: answer.index(END)] if END in answer else answer)
        assert len({tuple(answer) for answer in answers}) > 4, "the answers must differ, or a mix-up would not show"
        return answers

    return make
