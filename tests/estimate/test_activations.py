"""What a training step holds without data is what a real one holds: saved tensors, and every allocation on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.estimate.batch import BatchShape
from ludwig_peft_plugin.estimate.storage import model_tensors, storages
from ludwig_peft_plugin.estimate.tracker import BACKWARD, MemoryTracker

LENGTHS = (24, 17, 30)
LINEAR = {"target_modules": "all-linear", "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"type": "lora", "r": 4, **LINEAR}},
    "dora": {"adapter": {"type": "dora", "r": 4, "dropout": 0.0}},
    "ia3": {"adapter": "ia3"},
    "full fine-tuning": {"adapter": None},
    "qlora": {"adapter": {"type": "qlora", "r": 4, "dropout": 0.0}},
    "checkpointing": {
        "adapter": {"type": "lora", "r": 4, **LINEAR},
        "trainer": {"enable_gradient_checkpointing": True},
    },
}


def real_batch() -> MicroBatch:
    """Three sequences of which the second half are targets."""
    total = sum(LENGTHS)
    ends = np.cumsum((0, *LENGTHS))
    places = np.concatenate([np.arange(s + (e - s) // 2, e - 1) for s, e in pairwise(ends)])
    ids = torch.randint(3, 190, (total,), generator=torch.Generator().manual_seed(0))
    owners = np.searchsorted(ends, places, side="right") - 1
    return MicroBatch(
        rows=np.arange(len(LENGTHS)),
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_length=max(LENGTHS),
        targets=ids[places + 1],
        target_positions=torch.from_numpy(places),
        target_rows=torch.from_numpy(owners),
        tokens=total,
    )


def models(make_config: Any, case: str) -> tuple[Any, Any]:
    """Return the model without data and the real one on the CPU, both in training mode."""
    from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
    from ludwig_peft_plugin.estimate.meta_model import MetaLLM
    from ludwig_peft_plugin.model.llm import PeftLLM

    config_obj = make_config(precision="float32", **CASES[case])
    torch.manual_seed(0)
    real = PeftLLM(config_obj, _device="cpu")
    real.prepare_for_training()
    real.train()
    if config_obj.trainer.enable_gradient_checkpointing:
        enable_checkpointing(real.model)
    return MetaLLM(config_obj), real


def saved_bytes(llm: Any, batch: MicroBatch) -> int:
    """Return the bytes of the distinct storages that the forward pass leaves for the backward pass."""
    resident = storages(model_tensors(llm.model)).keys()
    found: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)  # alive until the end, so that no storage takes another's place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = llm(batch)
    size = sum(size for key, size in storages(found).items() if key not in resident)
    del result
    return size


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """Without data PyTorch takes the plain form of attention; the real run must too."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_are_those_of_a_real_run(case: str, make_config: Any) -> None:
    """Both off the GPU: padded attention and PyTorch's own operations."""
    empty, real = models(make_config, case)
    batch = real_batch()
    expected = saved_bytes(real, batch)
    assert expected > 0
    assert saved_bytes(empty, BatchShape.of(batch).on_meta()) == pytest.approx(expected, rel=0.01)


def cpu_peak(step: Callable[[], None]) -> int:
    """Return the most bytes that `step` holds at once, by the CPU allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("case", ["lora", "full fine-tuning", "checkpointing"])
def test_the_peak_is_that_of_the_allocator(case: str, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ludwig_peft_plugin.estimate.storage.BLOCK", 1)  # the CPU's does not round
    empty, real = models(make_config, case)
    batch = real_batch()

    def step(llm: Any, inputs: MicroBatch, tracker: MemoryTracker | None = None) -> None:
        loss = llm(inputs).loss_sum
        if tracker is not None:
            tracker.phase = BACKWARD
        loss.backward()

    step(real, batch)  # the first step fills caches of PyTorch's
    real.zero_grad(set_to_none=True)
    expected = cpu_peak(lambda: step(real, batch))
    tracker = MemoryTracker(model_tensors(empty.model))
    with tracker:
        step(empty, BatchShape.of(batch).on_meta(), tracker)
    assert tracker.peak == pytest.approx(expected, rel=0.08)
