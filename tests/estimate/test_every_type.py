"""Every adapter type on every quantisation has an estimate, of as many adapter parameters as training attaches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import adapter_registry

from ludwig_peft_plugin.register import register

register()

OPTIONS: dict[str, dict[str, Any]] = {
    "bitfit": {"create": True},  # Llama has no biases
    "layers": {"last": 1},
    "ln_tuning": {"target_modules": None},
    "multitask_prompt_tuning": {"task_column": "task"},
}
"""What a type needs to be trained on the tiny base."""

ON_QUANTISED: dict[str, dict[str, Any]] = {"layers": {"last": None, "pattern": "lm_head.weight"}}
"""The same, where the base is quantised."""

FEW = ["k_proj", "down_proj"]
"""Targets on a quantised base, where reading weights takes time: more inputs than outputs, and other sizes."""

QUANTISATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "float8": {"backend": "torchao", "mode": "float8"},
    "int8": {"backend": "torchao", "mode": "int8_weight_only"},
}


def cases(*, possible: bool) -> list[Any]:
    """Return the types with the quantisations they go with, or with those they do not go with."""
    from ludwig_peft_plugin.config.adapter_types import trains_quantized

    found = []
    for kind, cls in sorted(adapter_registry.items()):
        for name, settings in QUANTISATIONS.items():
            if settings is None and getattr(cls, "default_quantization", None):
                continue  # is never without
            if possible == (settings is None or trains_quantized(cls, settings.get("backend"))):
                found.append(pytest.param(kind, name, id=f"{kind}, {name}"))
    return found


@pytest.fixture(scope="module")
def configured(make_config: Any, bases: Any) -> Any:
    """A function that returns the config of a type on a base of one layer, with the quantisation of a name."""

    def make(kind: str, quantisation: str) -> Any:
        settings = QUANTISATIONS[quantisation]
        adapter = {"type": kind, **OPTIONS.get(kind, {}), **(ON_QUANTISED.get(kind, {}) if settings else {})}
        if settings and "target_modules" in adapter_registry[kind].model_fields:
            adapter.setdefault("target_modules", FEW)
        sections = {} if settings is None else {"quantization": settings}
        plain = {"optimizer": {"type": "sgd"}}  # the quickest to make
        return make_config(bases.llama(layers=1), adapter, trainer=plain, **sections)

    return make


@pytest.fixture(scope="module")
def loaded(configured: Any) -> Any:
    """A function that returns a base with the quantisation of a name, a new one each time."""
    from ludwig_peft_plugin.model.base_model import load_base_model, load_model_config

    known: dict[str, Any] = {}

    def base(quantisation: str) -> Any:
        if quantisation not in known:
            config_obj = configured("lora", quantisation)
            known[quantisation] = load_base_model(config_obj, load_model_config(config_obj), torch.device("cpu"))
        return copy.deepcopy(known[quantisation])

    return base


@pytest.mark.parametrize(("kind", "quantisation"), cases(possible=True))
def test_as_many_parameters_as_a_real_adapter(kind: str, quantisation: str, configured: Any, loaded: Any) -> None:
    from ludwig_peft_plugin.adapters.build import attach_adapter
    from ludwig_peft_plugin.estimate.memory import Estimator
    from ludwig_peft_plugin.estimate.meta_model import with_plain_start

    config_obj = configured(kind, quantisation)
    base = loaded(quantisation)
    before = sum(parameter.numel() for parameter in base.parameters())
    model = attach_adapter(base, with_plain_start(config_obj).adapter)
    parameters = list(model.parameters())
    made = Estimator(config_obj).parameters
    assert made.adapter == sum(parameter.numel() for parameter in parameters) - before
    assert made.trained == sum(parameter.numel() for parameter in parameters if parameter.requires_grad) > 0


@pytest.mark.parametrize("kind", sorted(adapter_registry))
def test_a_step_is_followed_and_no_formula_is_needed(kind: str, configured: Any) -> None:
    from ludwig_peft_plugin.estimate.batch import batch_plan
    from ludwig_peft_plugin.estimate.memory import Estimator

    made = Estimator(configured(kind, "none"))
    found = made.estimate(batch_plan(made.config_obj, made.llm.model_config).shape(4))
    assert found.obstacle is None
    assert found.peak > made.base_bytes + made.adapter_bytes + made.gradient_bytes


@pytest.mark.parametrize(("kind", "quantisation"), cases(possible=False))
def test_where_a_type_does_not_go_with_a_quantisation_the_reason_is_said(
    kind: str, quantisation: str, configured: Any
) -> None:
    with pytest.raises(ConfigValidationError, match=f"`{kind}` cannot be trained on a quantised base, because "):
        configured(kind, quantisation)
