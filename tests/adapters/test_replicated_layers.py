"""LoRA's `layer_replication`: copies of layers train and answer as the model they are part of."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import SHAPE, batch, build
from peft import LoraConfig
from transformers import GenerationConfig

from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft
from ludwig_peft_plugin.model.generation import generate_answers
from ludwig_peft_plugin.training.loss import target_loss

OPTIONS: dict[str, dict[str, Any]] = {"fused": {}, "not fused": {"use_dora": True, "lora_dropout": 0.1}}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def model(request: pytest.FixtureRequest) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **request.param}
    config = LoraConfig(task_type="CAUSAL_LM", layer_replication=[(0, 2), (1, 2)], **settings)
    return wrap_with_peft(build(), config).eval()


def test_the_loss_is_that_of_whole_rows_one_at_a_time(model: Any) -> None:
    plain, part = copy.deepcopy(model), batch()
    rows = part.input_ids.split(part.cu_seqlens.diff().tolist())
    with torch.no_grad():
        logits = torch.cat([plain(input_ids=row[None]).logits[0] for row in rows])
        expected = torch.nn.functional.cross_entropy(
            logits[part.target_positions].double(), part.targets, reduction="sum"
        )
        assert float(target_loss(model, part).loss_sum) == pytest.approx(float(expected), rel=1e-5)


def test_answers_are_those_of_transformers(model: Any) -> None:
    plain = copy.deepcopy(model)
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 9, 6)]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=[SHAPE["vocab_size"] - 1]
    )
    with torch.no_grad():
        target_loss(model, batch())  # which prepares the model for training
        answers = generate_answers(model, prompts, settings, device=torch.device("cpu"))
        for prompt, answer in zip(prompts, answers, strict=True):
            alone = plain.generate(input_ids=torch.from_numpy(prompt).long()[None], generation_config=settings)[0]
            made = alone[len(prompt) :].tolist()
            assert answer.tokens.tolist() == made[: len(answer.tokens)]
            assert len(answer.tokens) >= len(made) - 1  # without the token that ends it
