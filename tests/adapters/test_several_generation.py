"""Rows of several adapters answered together: mixed in a batch, in groups, and through the fused layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ludwig_peft_plugin.adapters.several import mixed
from ludwig_peft_plugin.adapters.several.active import BASE, set_adapter, use_adapter
from ludwig_peft_plugin.adapters.several.attach import attach_adapters
from ludwig_peft_plugin.config.adapters_section import AdaptersConfig
from ludwig_peft_plugin.data.batches import collate
from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.engine import install
from ludwig_peft_plugin.model import padded_generation
from ludwig_peft_plugin.model.generation import generate_answers
from ludwig_peft_plugin.training.loss import target_loss

LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
NAMES = ["one", "two", None, BASE, "two", "one", "two"]


def several(tiny, **changes: Any) -> Any:
    """A base with two adapters whose weights are far from zero."""
    section = {"adapters": {"one": LORA, "two": {**LORA, "r": 2, **changes}}, "active": "two"}
    torch.manual_seed(3)
    model = attach_adapters(tiny.base(), AdaptersConfig.model_validate(section))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("changes", "mixes"), [({}, True), ({"use_dora": True}, False)])
def test_rows_are_answered_as_one_by_one(tiny, monkeypatch, changes, mixes, beams):
    model = several(tiny, **changes)
    assert mixed.can_mix(model, ["one", "two"]) is mixes
    seen: list[Any] = []
    original = padded_generation._generate

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(padded_generation, "_generate", spy)
    prompts = [row[: 5 + index].numpy() for index, row in enumerate(tiny.ids.repeat(2, 1)[: len(NAMES)])]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=[2], pad_token_id=0)
    device = torch.device("cpu")
    made = mixed.generate_by_adapter(model, prompts, NAMES, config, device=device)
    assert any(isinstance(names, list) and len(set(names)) == 3 for names in seen) is mixes
    for prompt, name, answer in zip(prompts, NAMES, made, strict=True):
        with mixed.using(model, name):
            alone = generate_answers(model, [prompt], config, device=device)[0]
        np.testing.assert_array_equal(answer.tokens, alone.tokens)
        np.testing.assert_allclose(answer.probabilities, alone.probabilities, rtol=1e-4)


def test_large_groups_fill_batches_of_their_own(tiny, monkeypatch):
    model, sizes = several(tiny), []
    original = generate_answers
    monkeypatch.setattr(
        "ludwig_peft_plugin.model.generation.generate_answers",
        lambda model, prompts, *args, **options: (
            sizes.append(len(prompts)) or original(model, prompts, *args, **options)
        ),
    )
    monkeypatch.setattr(mixed, "MIXED_BELOW", 3)
    prompts = [tiny.ids[0, : 6 + index].numpy() for index in range(len(NAMES))]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=[2], pad_token_id=0)
    made = mixed.generate_by_adapter(model, prompts, NAMES, config, device=torch.device("cpu"))
    assert sizes == [3]  # the rows of `two`; the others are fewer, and share a batch
    assert [len(answer.tokens) > 0 for answer in made] == [True] * len(NAMES)


def test_fused_layers_follow_the_active_adapter(tiny):
    model = several(tiny)
    rows = [tiny.ids[index, : 9 + 2 * index].numpy().astype(np.int32) for index in range(4)]
    dataset = TokenDataset(
        Ragged.from_lists([row.tolist() for row in rows]),
        np.full(4, 4, dtype=np.int32),
        __import__("pandas").DataFrame({"p": ["x"] * 4, "o": ["y"] * 4}),
        has_targets=True,
    )
    batch = collate(dataset, np.arange(4))
    losses = {}
    for name in ("two", "one", "two", None):
        with use_adapter(model, name), torch.no_grad():
            losses[name] = float(target_loss(model, batch).loss_sum)
            expected = 0.0
            for row in rows:
                ids = torch.from_numpy(row).long()[None]
                chances = model.get_base_model()(input_ids=ids).logits[0, 3:-1].log_softmax(-1)
                expected -= float(chances.gather(1, ids[0, 4:, None]).sum())
        assert losses[name] == pytest.approx(expected, rel=1e-5), name
    assert install.fused_layers(model.get_base_model()), "the layers are to be fused in this test"
    assert len({round(loss, 3) for loss in losses.values()}) == 3
    set_adapter(model, "one", trained=["one"])
    model.train()
    target_loss(model, batch).loss_sum.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("one" in name.split(".") for name in trained)
