"""On a GPU: trained weights of the base in bfloat16, full fine-tuning, and their memory against the estimate."""

from __future__ import annotations

import gc
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from ludwig_peft_plugin.data.batches import MicroBatch, StepBatch
from ludwig_peft_plugin.model.base_model import ASSETS

pytestmark = pytest.mark.gpu

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of 190 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    for tokenizer in (ASSETS / "tiny-llama-python").glob("tokenizer*"):
        shutil.copy(tokenizer, folder)
    return str(folder)


def configured(base: str, case: str) -> Any:
    from ludwig.schema.model_types.base import ModelConfig

    return ModelConfig.from_dict(
        {
            "model_type": "llm",
            "base_model": base,
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "preprocessing": {"global_max_sequence_length": 2048},
            "trainer": {"type": "finetune", "batch_size": len(LENGTHS), "learning_rate": 1e-3},
            **CASES[case],
        }
    )


def micro_batch(lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    """Sequences of the given lengths, all of whose tokens but the first carry loss."""
    ends = np.cumsum((0, *lengths))
    ids = torch.randint(3, 4000, (int(ends[-1]),), generator=torch.Generator().manual_seed(0))
    places = np.setdiff1d(np.arange(ends[-1]), ends[1:] - 1)
    return MicroBatch(
        rows=np.arange(len(lengths)),
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_length=max(lengths),
        targets=ids[places + 1],
        target_positions=torch.from_numpy(places),
        target_rows=torch.from_numpy(np.searchsorted(ends, places, side="right") - 1),
        tokens=int(ends[-1]),
    )


def trainer_of(config_obj: Any) -> Any:
    from ludwig_peft_plugin.model.llm import PeftLLM
    from ludwig_peft_plugin.training.trainer import PeftTrainer

    torch.manual_seed(0)
    llm = PeftLLM(config_obj, _device="cuda")
    trainer = PeftTrainer(config_obj.trainer, llm, device="cuda")
    llm.train()
    return trainer


def gradients(config_obj: Any, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step, before the optimiser takes them."""
    trainer = trainer_of(config_obj)
    trainer._step_optimizer = lambda: None
    trainer.train_step(StepBatch.of([batch]))
    return {name: p.grad.float().cpu() for name, p in trainer.model.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_near_the_measured_peak(case: str, registered: None, base: str) -> None:
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    config_obj, batch = configured(base, case), micro_batch()
    estimate = Estimator(config_obj).estimate(BatchShape.of(batch))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = trainer_of(config_obj)
    losses = [float(trainer.train_step(StepBatch.of([batch]))[0]) for _ in range(5)]
    measured = torch.cuda.max_memory_allocated() - before
    assert losses[-1] < losses[0]
    assert estimate.peak == pytest.approx(measured, rel=0.1), {
        part: round(size / 2**20) for part, size in estimate.at_peak.items()
    }


@pytest.mark.parametrize("case", ["norms", "new biases", "two layers", "first layer", "head"])
def test_gradients_in_bfloat16_are_those_of_plain_layers(
    case: str, registered: None, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_obj, batch = configured(base, case), micro_batch((190, 260, 64))
    mine = gradients(config_obj, batch)
    monkeypatch.setenv("LUDWIG_PEFT_FUSED", "0")
    monkeypatch.setenv("LUDWIG_PEFT_CUDA_GRAPHS", "0")
    plain = gradients(config_obj, batch)
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert (mine[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_weights_change_on_a_gpu_and_the_base_does_not(registered: None, base: str) -> None:
    """Twice the same size of micro-batch: a CUDA graph that knew LoRA alone would leave the copies as they are."""
    trainer = trainer_of(configured(base, "norms"))
    model = trainer.model.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(4):
        trainer.train_step(StepBatch.of([micro_batch((190, 260, 64))]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_float32_attention_keeps_no_scores(registered: None, base: str) -> None:
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
