"""On a GPU: generation and training that are recorded as CUDA graphs follow the adapter that is active."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2ForCausalLM

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.adapters.several.active import set_adapter, use_adapter
from ludwig_peft_plugin.adapters.several.attach import attach_adapters
from ludwig_peft_plugin.config.adapters_section import AdaptersConfig
from ludwig_peft_plugin.data.batches import collate
from ludwig_peft_plugin.decoding import step
from ludwig_peft_plugin.model.generation import generate_answers
from ludwig_peft_plugin.training.loss import target_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("registered")]

DEVICE = torch.device("cuda")
END = 0  # the token of the shipped tokenizer
EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear"}
LAST_LAYER: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
ORDER = ("one", "two", "one")


def pair(folder: str, options: dict[str, Any]) -> Any:
    """Return a base with two LoRA adapters far from zero, always the same."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": DEVICE})
    lora = {"type": "lora", "dropout": 0.0, **options}
    section = {"adapters": {"one": {**lora, "r": 4}, "two": {**lora, "r": 8}}}
    model = attach_adapters(base.requires_grad_(False), AdaptersConfig.model_validate(section))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_recorded_answers_follow_the_adapter(
    base_folders: dict[str, str], random_bases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []
    record = step.Steps._record

    def spy(self: Any) -> None:
        record(self)
        recorded.append(int(self._graph is not None))

    monkeypatch.setattr(step.Steps, "_record", spy)
    rows = random_bases.Rows((7, 3, 9, 12), tasks=False)
    prompts = [rows.input_ids[row] for row in rows.numbers]
    config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=[END], pad_token_id=END)

    def answers(model: Any) -> list[tuple[list[int], list[float]]]:
        made = generate_answers(model, prompts, config, device=DEVICE)
        return [(answer.tokens.tolist(), answer.probabilities.tolist()) for answer in made]

    switched = pair(base_folders["qwen2"], EVERYWHERE).eval()
    found = []
    for name in ORDER:
        with use_adapter(switched, name):
            found.append(answers(switched))
    for name, made in zip(ORDER, found, strict=True):
        fresh = pair(base_folders["qwen2"], EVERYWHERE).eval()
        set_adapter(fresh, name)
        assert answers(fresh) == made
    assert found[0] != found[1]
    assert recorded == [1] * 2 * len(ORDER)


@pytest.mark.parametrize("options", [EVERYWHERE, LAST_LAYER], ids=["all layers", "the last layer"])
def test_recorded_training_follows_the_adapter(
    base_folders: dict[str, str], random_bases: ModuleType, options: dict[str, Any]
) -> None:
    """With adapters in the last layer alone, nothing in the first one tells which of them is active."""
    rows = random_bases.Rows((17, 40, 9, 26), tasks=False)
    part = collate(rows, rows.numbers).to(DEVICE)

    def passes(model: Any, name: str) -> tuple[list[float], dict[str, Tensor]]:
        """Return the losses and the sum of the gradients of some passes, the last of which are replayed."""
        set_adapter(model, name, trained=[name])
        model.train()
        model.zero_grad(set_to_none=True)
        losses = []
        for _ in range(4):
            loss = target_loss(model, part).loss_sum
            loss.backward()
            losses.append(loss.item())
        assert model.get_base_model().__dict__["_ludwig_peft_graphs"].graphs
        named = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
        assert named
        assert all(name in path.split(".") for path in named)
        return losses, named

    switched = pair(base_folders["qwen2"], options)
    for name in ORDER:
        losses, gradients = passes(switched, name)
        expected_losses, expected = passes(pair(base_folders["qwen2"], options), name)
        assert losses == pytest.approx(expected_losses, rel=1e-3)
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3), "replayed as it was run"
        assert gradients.keys() == expected.keys()
        for path, gradient in gradients.items():
            assert (gradient - expected[path]).norm() < 1e-2 * expected[path].norm(), path
    losses, gradients = passes(switched, "one")
    switched.eval()
    with torch.no_grad(), use_adapter(switched, None):
        alone = float(target_loss(switched, part).loss_sum)
    filler = [torch.full((256,), float("nan"), device=DEVICE) for _ in range(4096)]  # also where memory was freed
    again, repeated = passes(switched, "one")
    assert all(torch.isnan(tensor).all() for tensor in filler), "a graph has written where it no longer may"
    assert again == pytest.approx(losses, rel=1e-3)
    assert alone != losses[0]
    for path, gradient in repeated.items():
        assert (gradient - gradients[path]).norm() < 1e-2 * gradients[path].norm(), path
