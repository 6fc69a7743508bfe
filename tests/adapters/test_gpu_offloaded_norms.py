"""DoRA's norms on a GPU, of a base that stays in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ludwig_peft_plugin.adapters.methods.dora import DoraConfig


@pytest.mark.gpu
def test_offloaded_norms_are_computed_on_the_gpu(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    devices = []
    original = DoraLinearLayer.get_weight_norm

    def spy(self: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        devices.append(weight.device.type)
        return original(self, weight, *args, **kwargs)

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", spy)
    model = tiny.attach(DoraConfig(ephemeral_gpu_offload=True))
    assert set(devices) == {"cuda"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
