"""Keeping checkpoints and the embedding in host memory changes where numbers lie, and nothing else."""

import copy
import gc

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.embeddings import offload_embedding
from ludwig_peft_plugin.training.loss import target_loss

pytestmark = pytest.mark.gpu

LENGTHS = (700, 300, 500, 548)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch(seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    input_ids = torch.randint(0, 4096, (int(offsets[-1]),), generator=generator)
    owners = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    places = torch.arange(len(input_ids))
    predicted = places[1:][owners[1:] == owners[:-1]]
    return MicroBatch(
        rows=np.arange(len(LENGTHS)),
        input_ids=input_ids,
        position_ids=places - torch.from_numpy(offsets)[owners],
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        max_length=max(LENGTHS),
        targets=input_ids[predicted],
        target_positions=predicted - 1,
        target_rows=owners[predicted],
        tokens=len(input_ids),
    ).to("cuda")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_key_value_heads=4, **shape)).to(torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(base.requires_grad_(False), config).to("cuda").train()


def steps(model: torch.nn.Module) -> tuple[list[float], torch.Tensor, int]:
    """Return the losses of five optimiser steps, the parameters after them, and the peak of memory."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    torch.cuda.reset_peak_memory_stats()
    for seed in range(5):
        part = batch(seed)
        loss = target_loss(model, part).loss_sum / part.target_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    peak = torch.cuda.max_memory_allocated()
    return [float(loss) for loss in losses], torch.cat([p.detach().flatten() for p in parameters]), peak


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_offloading_changes_no_number_and_takes_less_memory(model, graphs, monkeypatch):
    monkeypatch.setenv("LUDWIG_PEFT_CUDA_GRAPHS", graphs)
    start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    results = {}
    for name, offload in (("plain", None), ("checkpointed", False), ("offloaded", True)):
        other = copy.deepcopy(model)
        if offload is not None:
            enable_checkpointing(other, offload=offload)
        results[name] = steps(other)
        del other
        gc.collect()  # a model and its graphs refer to each other
        torch.cuda.empty_cache()
    movement = (results["plain"][1] - start).norm()
    for name in ("checkpointed", "offloaded"):
        assert results[name][0] == pytest.approx(results["plain"][0], rel=1e-3)
        # Adam turns a rounding of a gradient near zero into a step of its own, so single parameters may differ.
        assert (results[name][1] - results["plain"][1]).norm() < 0.1 * movement
    assert results["offloaded"][2] < results["checkpointed"][2] < results["plain"][2]


def test_an_embedding_in_host_memory_gives_the_same_rows(model):
    other = copy.deepcopy(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    freed = offload_embedding(other)
    assert before - torch.cuda.memory_allocated() == freed
    weight = other.get_input_embeddings().weight
    assert weight.is_cuda
    assert freed == weight.nbytes
    with torch.no_grad():
        part = batch(9)
        expected = target_loss(model, part).loss_sum
        assert torch.equal(target_loss(other, part).loss_sum, expected)
