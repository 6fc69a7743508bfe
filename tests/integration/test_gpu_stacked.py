"""On a GPU, layers multiplied as one give what layers apart give: under each attention, in CUDA graphs, in 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import ALL
from micro_batches import micro_batch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.attention import takes_short_kernel
from ludwig_peft_plugin.engine.fused import adapted_stack
from ludwig_peft_plugin.engine.install import decoder_layers
from ludwig_peft_plugin.training.loss import target_loss

pytestmark = pytest.mark.gpu

LENGTHS = {
    "short": (37, 100, 64, 5, 90),
    "long": (700, 900, 30),
    "equal": (128, 128, 128, 128),
}
"""Of sequences that the kernel for short ones, flash attention, and attention in rows take."""

OPTIONS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ranks by layer": {"rank_pattern": {"k_proj": 7, "up_proj": 3}},
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "dropout": {"lora_dropout": 0.1},
}
FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def adapted(folder: Path, quantization: BitsAndBytesConfig | None = None, **options: Any) -> Any:
    settings = {"device_map": "cuda", "dtype": torch.bfloat16, "quantization_config": quantization}
    base = AutoModelForCausalLM.from_pretrained(folder, **settings)
    torch.manual_seed(1)
    lora = {"r": 8, "lora_alpha": 24, "target_modules": ALL, "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora)).train()


def passes(model: Any, batch: MicroBatch) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return loss and gradients of three passes: launched from Python, recorded as a graph, and replayed."""
    found = []
    for _ in range(3):
        model.zero_grad()
        torch.manual_seed(5)
        loss = target_loss(model, batch).loss_sum
        (loss / 100).backward()
        found.append(
            (float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        )
    return found


def compare(model: Any, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = micro_batch(lengths).to("cuda")
    twin = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr("ludwig_peft_plugin.engine.fused.group.stacked", lambda *_: None)
        apart = passes(twin, batch)
    for (loss, gradients), (expected, others) in zip(passes(model, batch), apart, strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
        for name, gradient in others.items():
            assert gradient.norm() > 0, name
            assert (gradients[name] - gradient).norm() / gradient.norm() < 3e-2, name
    parts = [layer.forward._parts for layer in decoder_layers(model)]
    assert all(part.attention.group.stack and part.feed_forward.gate_up.stack for part in parts)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(lengths: str, options: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(adapted(folder, **OPTIONS[options]), LENGTHS[lengths], monkeypatch)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_over_a_four_bit_base(lengths: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(adapted(folder, FOUR_BIT), LENGTHS[lengths], monkeypatch)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_of_outputs_are_not_copied(lengths: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes them lays them out side by side."""
    batch, original, copied = micro_batch(LENGTHS[lengths]).to("cuda"), adapted_stack.side_by_side, []

    def spied(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = original(parts)
        copied.append(whole.data_ptr() != parts[0].data_ptr())
        return whole

    monkeypatch.setattr(adapted_stack, "side_by_side", spied)
    target_loss(adapted(folder), batch).loss_sum.backward()
    assert copied == [False] * 4
    states = torch.empty(batch.tokens, 256, device="cuda", dtype=torch.bfloat16)
    short = takes_short_kernel(states, 32, batch.cu_seqlens, batch.max_length, None)
    assert short == (lengths == "short")


def test_weights_take_no_more_memory(folder: Path) -> None:
    model, batch = adapted(folder), micro_batch(LENGTHS["short"]).to("cuda")
    weights = [p for p in model.parameters() if not p.requires_grad]
    size = sum(p.nbytes for p in weights)
    target_loss(model, batch).loss_sum.backward()
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in weights}
    assert sum(storages.values()) == size
    expected = passes(model, batch)
    model.cpu().cuda()  # each weight by itself again, perhaps where it lay before
    for (loss, _), (before, _) in zip(passes(model, batch), expected, strict=True):
        assert loss == pytest.approx(before, rel=1e-3)
