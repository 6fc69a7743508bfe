"""On a GPU: trained weights of the base in bfloat16, full fine-tuning, and their memory against the estimate."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from micro_batches import micro_batch
from text_runs import new_trainer, take_steps, text_config

from ludwig_peft_plugin.data.batches import MicroBatch, StepBatch

pytestmark = pytest.mark.gpu

LENGTHS = (900, 1100, 500, 1596)
CASES: dict[str, dict[str, Any]] = {
    "norms": {"adapter": {"type": "ln_tuning"}},
    "new biases": {"adapter": {"type": "bitfit", "create": True}},
    "two layers": {"adapter": {"type": "layers"}},
    "first layer": {"adapter": {"type": "layers", "first": 1}},
    "head": {"adapter": {"type": "layers", "pattern": "lm_head.weight"}},
    "norms of a 4-bit base": {"adapter": {"type": "ln_tuning"}, "quantization": {"bits": 4}},
    "full in bfloat16": {"adapter": {"type": "full"}},
    "full in float32": {"adapter": {"type": "full", "compute": "float32"}},
}


def configured(base: str, case: str) -> Any:
    """Return a config whose batches are as large as the micro-batches here."""
    return text_config(
        base,
        preprocessing={"global_max_sequence_length": 2048},
        trainer={"batch_size": len(LENGTHS), "learning_rate": 1e-3},
        **CASES[case],
    )


def gradients(config_obj: Any, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, before the optimiser takes them."""
    trainer = new_trainer(config_obj, "cuda")
    trainer._step_optimizer = lambda: None
    trainer.train_step(StepBatch.of([batch]))
    return {name: p.grad.float().cpu() for name, p in trainer.model.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_the_measured_peak(case: str, registered: None, llama_175m: str) -> None:
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    config_obj, batch = configured(llama_175m, case), micro_batch(LENGTHS)
    estimate = Estimator(config_obj).estimate(BatchShape.of(batch))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = new_trainer(config_obj, "cuda")
    losses = take_steps(trainer, [StepBatch.of([batch])] * 5)
    measured = torch.cuda.max_memory_allocated() - before
    assert losses[-1] < losses[0]
    assert estimate.peak == pytest.approx(measured, rel=0.1), {
        part: round(size / 2**20) for part, size in estimate.at_peak.items()
    }


@pytest.mark.parametrize("case", ["norms", "new biases", "two layers", "first layer", "head"])
def test_gradients_in_bfloat16_are_those_of_plain_layers(
    case: str, registered: None, llama_175m: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_obj, batch = configured(llama_175m, case), micro_batch((190, 260, 64))
    mine = gradients(config_obj, batch)
    monkeypatch.setenv("LUDWIG_PEFT_FUSED", "0")
    monkeypatch.setenv("LUDWIG_PEFT_CUDA_GRAPHS", "0")
    plain = gradients(config_obj, batch)
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert (mine[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_weights_change_on_a_gpu_and_the_base_does_not(registered: None, llama_175m: str) -> None:
    """Twice the same size of micro-batch: a CUDA graph that knew LoRA alone would leave the copies as they are."""
    trainer = new_trainer(configured(llama_175m, "norms"), "cuda")
    model = trainer.model.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_steps(trainer, [StepBatch.of([micro_batch((190, 260, 64))])] * 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_float32_attention_keeps_no_scores(registered: None, llama_175m: str) -> None:
    """16 heads that share 4 keys, in float32: the plain formula would keep 652 MB of scores a layer."""
    from ludwig_peft_plugin.engine.attention import varlen_attention

    query, key, value = (torch.randn(sum(LENGTHS), heads, 64, device="cuda") for heads in (16, 4, 4))
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    ends = torch.tensor(np.cumsum((0, *LENGTHS)), dtype=torch.int32, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    varlen_attention(*tensors, ends, max(LENGTHS), 0.125).sum().backward()
    scores = len(LENGTHS) * 16 * max(LENGTHS) ** 2 * 4
    assert torch.cuda.max_memory_allocated() - before < scores / 2
