"""Options of bottleneck adapters: each has an effect, and what does not fit is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from disturbed import disturbed
from ludwig.error import ConfigValidationError
from peft import get_peft_model

from ludwig_peft_plugin.adapters.bottleneck import BottleneckConfig
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.methods.bottleneck import BottleneckAdapterConfig
from ludwig_peft_plugin.errors import AdapterError

DIFFERENT: dict[str, tuple[dict[str, Any], Any]] = {
    "architecture": ({}, "houlsby"),
    "reduction_factor": ({"reduction_factor": None}, 4),
    "bottleneck_size": ({"reduction_factor": None}, 3),
    "non_linearity": ({}, "tanh"),
    "scaling": ({}, 2.0),
    "mh_adapter": ({}, True),
    "output_adapter": ({"mh_adapter": True}, False),
    "is_parallel": ({"original_ln_before": False}, True),
    "ln_before": ({}, True),
    "ln_after": ({}, True),
    "adapter_residual_before_ln": ({"ln_after": True}, True),
    "original_ln_before": ({}, False),
    "original_ln_after": ({"residual_before_ln": False}, False),
    "residual_before_ln": ({}, False),
    "leave_out": ({}, [1]),
    "init_weights": ({}, "bert"),
}
ELSEWHERE = {"type", "postprocessor", "pretrained_adapter_weights", "dropout"}


def test_every_option_is_tested() -> None:
    assert {*DIFFERENT} | ELSEWHERE == {*BottleneckAdapterConfig.model_fields}


@pytest.mark.parametrize("name", DIFFERENT)
def test_options_have_an_effect(tiny: Any, name: str) -> None:
    others, value = DIFFERENT[name]
    # What `original_ln_after: false` goes with is only valid as a whole; PEFT's config takes the halves too.
    config = [
        BottleneckConfig(
            task_type="CAUSAL_LM",
            **{k: v for k, v in {"reduction_factor": 8, **others, **more}.items() if v is not None},
        )
        for more in ({}, {name: value})
    ]
    results = []
    for entry in config:
        torch.manual_seed(7)
        model = get_peft_model(tiny.base(), entry)
        results.append(tiny.logits(model if name == "init_weights" else disturbed(model, 0.1)))
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bottleneck_size": 4, "reduction_factor": 8}, "beside bottleneck_size"),
        ({"output_adapter": False}, "no adapter"),
        ({"architecture": "houlsby", "residual_before_ln": False}, "residual_before_ln has no effect"),
        ({"architecture": "parallel", "original_ln_before": True}, "original_ln_before has no effect"),
        ({"adapter_residual_before_ln": True}, "without ln_after"),
        ({"original_ln_after": False}, "drop the block's input"),
        ({"reduction_factor": {"first": 2}}, "mapping from layer numbers"),
        ({"scaling": "some"}, "learned or channel"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigValidationError, ValueError), match=said):
        BottleneckAdapterConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leave_out": [3]}, "layer 3 does not exist"),
        ({"leave_out": [0, 1, 2]}, "all 3 layers"),
        ({"reduction_factor": {0: 4}}, "says nothing about layer 1"),
    ],
)
def test_options_that_do_not_fit_the_model(tiny: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        attach_adapter(tiny.base(), BottleneckAdapterConfig(**options))
