"""`ludwig-peft estimate` counts trained copies: numbers, bytes, and what they keep for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro_batches import micro_batch
from text_runs import text_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from ludwig_peft_plugin.data.batches import MicroBatch

ADAPTERS: dict[str, dict[str, Any]] = {
    "norms": {"type": "ln_tuning"},
    "new biases": {"type": "bitfit", "create": True},
    "last layer": {"type": "layers", "last": 1},
    "tied head": {"type": "layers", "pattern": "lm_head.weight"},
}


def saved_bytes(llm: Any, part: MicroBatch) -> int:
    """Return the bytes of the distinct storages that the forward pass leaves for the backward pass."""
    from ludwig_peft_plugin.estimate.storage import model_tensors, storages

    resident = storages(model_tensors(llm.model)).keys()
    found: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)  # alive until the end, so that no storage takes another's place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        result = llm(part)
    size = sum(size for key, size in storages(found).items() if key not in resident)
    del result
    return size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_it_is_what_a_loaded_model_holds(registered: None, case: str, precision: str) -> None:
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator
    from ludwig_peft_plugin.model.llm import PeftLLM

    config_obj = text_config(adapter=ADAPTERS[case], precision=precision)
    real = PeftLLM(config_obj, _device="cpu")
    real.prepare_for_training()
    real.train()
    copies = [parameter for parameter in real.model.parameters() if parameter.requires_grad]
    estimator = Estimator(config_obj)
    count = estimator.parameters
    assert count.adapter == count.trained == sum(copy.numel() for copy in copies)
    assert (count.trained, count.base + count.adapter) == real.parameter_counts()
    assert estimator.adapter_bytes == sum(-(-copy.nbytes // 512) * 512 for copy in copies)
    assert estimator.gradient_bytes == estimator.adapter_bytes
    part = micro_batch((24, 40))
    expected = saved_bytes(real, part)
    assert saved_bytes(estimator.llm, BatchShape.of(part).on_meta()) == pytest.approx(expected, rel=0.02)
