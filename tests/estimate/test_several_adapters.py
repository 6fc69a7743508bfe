"""The estimate of a config with several adapters counts all of them, and trains those that training changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
WIDE = {**LORA, "r": 8}
SECTIONS: dict[str, dict[str, Any]] = {
    "two": {"adapters": {"one": LORA, "two": WIDE}},
    "one of two active is trained": {
        "adapters": {"one": LORA, "two": WIDE},
        "active": ["one", "two"],
        "trained": ["two"],
    },
    "cat": {"adapters": {"one": LORA, "two": WIDE}, "merge": {"sources": ["one", "two"], "combination_type": "cat"}},
    "svd": {"adapters": {"one": LORA, "two": WIDE}, "merge": {"sources": ["one", "two"], "combination_type": "svd"}},
    "ties": {"adapters": {"one": LORA, "two": LORA}, "merge": {"sources": ["one", "two"], "combination_type": "ties"}},
    "dora": {"adapters": {"one": LORA, "two": {"type": "dora", "r": 4}}, "active": "two"},
    "started from data": {"adapters": {"one": {**LORA, "init_lora_weights": "eva"}, "two": LORA}, "active": "two"},
    "ia3": {"adapters": {"one": "ia3", "two": "ia3"}, "merge": {"sources": ["one", "two"]}},
    "shira": {"adapters": {"one": "shira", "two": {"type": "shira", "r": 2}}},
    "vblora": {"adapters": {"one": "vblora", "two": "vblora"}},
    "prompts": {"adapters": {"one": {"type": "prompt_tuning", "init": "random"}, "two": "prompt_tuning"}},
    "prefixes": {"adapters": {"one": "prefix_tuning", "two": {"type": "prefix_tuning", "num_virtual_tokens": 3}}},
    "bottleneck": {"adapters": {"one": "bottleneck", "two": {"type": "bottleneck", "reduction_factor": 8}}},
}


def estimator(config_obj: Any) -> Any:
    from ludwig_peft_plugin.estimate.memory import Estimator

    return Estimator(config_obj)


@pytest.mark.parametrize("name", SECTIONS)
def test_adapters_are_counted_as_they_are_attached(name: str, make_config: Any) -> None:
    from ludwig_peft_plugin.adapters.several.attach import attach_adapters
    from ludwig_peft_plugin.estimate.meta_model import with_plain_start
    from ludwig_peft_plugin.estimate.storage import allocated_bytes, model_tensors, storages
    from ludwig_peft_plugin.model.base_model import load_base_model, load_model_config

    config_obj = make_config(adapter=None, adapters=SECTIONS[name])
    made = estimator(config_obj)
    base = load_base_model(config_obj, load_model_config(config_obj), torch.device("cpu"))
    numbers = sum(parameter.numel() for parameter in base.parameters())
    known = storages(model_tensors(base))
    model = attach_adapters(base, with_plain_start(config_obj).adapters)
    parameters = list(model.parameters())
    added = [tensor for tensor in model_tensors(model) if not storages([tensor]).keys() <= known.keys()]
    assert made.parameters.base == numbers
    assert made.parameters.base + made.parameters.adapter == sum(parameter.numel() for parameter in parameters)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert made.parameters.trained == sum(parameter.numel() for parameter in trained)
    assert made.adapter_bytes == allocated_bytes(added)
    assert made.gradient_bytes == allocated_bytes(trained)


def test_a_single_adapter_among_several_takes_what_it_takes_alone(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.batch import batch_plan

    alone = estimator(make_config(adapter=LORA))
    both = estimator(make_config(adapter=None, adapters={"adapters": {"one": LORA, "two": WIDE}}))
    shape = batch_plan(alone.config_obj, alone.llm.model_config).shape(4)
    first, second = alone.estimate(shape).at_peak, both.estimate(shape).at_peak
    more = both.adapter_bytes - alone.adapter_bytes
    assert more == 2 * alone.adapter_bytes
    assert second == {**first, "adapter": first["adapter"] + more}


def test_the_closed_formula_counts_active_adapters(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.batch import batch_plan
    from ludwig_peft_plugin.estimate.formula import formula_parts

    adapters = {"one": LORA, "two": WIDE}
    alone = estimator(make_config(adapter=LORA))
    shape = batch_plan(alone.config_obj, alone.llm.model_config).shape(4)

    def activations(**section: Any) -> int:
        return formula_parts(
            estimator(make_config(adapter=None, adapters={"adapters": adapters, **section})).llm, shape
        )[0]

    single, both = activations(), activations(active=["one", "two"])
    assert single == formula_parts(alone.llm, shape)[0]
    inputs = 3 * (6 * 64 + 192)  # of the linear layers of three decoder layers
    assert both - single == shape.tokens * 4 * (inputs + 3 * 7 * 8)


def test_a_quantised_base_under_several(make_config: Any) -> None:
    plain, quantised = (
        estimator(make_config(adapter=None, adapters={"adapters": {"one": kind, "two": LORA}}))
        for kind in (LORA, {"type": "qlora", "r": 4})
    )
    assert quantised.base_bytes < 0.6 * plain.base_bytes
    assert quantised.parameters.base == plain.parameters.base


def test_suggestions_name_each_adapter(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ludwig_peft_plugin.estimate.batch import batch_plan
    from ludwig_peft_plugin.estimate.suggest import Case, Memories, suggestions

    monkeypatch.setattr("ludwig_peft_plugin.estimate.suggest.WORTH_NAMING", 1)
    settings = {"adapters": {"one": LORA, "two": {**LORA, "r": 32}}, "active": ["one", "two"]}
    config_obj = make_config("tiny-llama-python", adapter=None, length=64, adapters=settings)
    made = estimator(config_obj)
    case, memories = Case(config_obj, batch_plan(config_obj, made.llm.model_config), 4), Memories(made)
    found = {entry.change.text: entry for entry in suggestions(case, memories.needed)}
    assert {"adapters.adapters.one.r: 2", "adapters.adapters.two.r: 16", "quantization: {bits: 4}"} <= found.keys()
    changed = {**settings, "adapters": {"one": LORA, "two": {**LORA, "r": 16}}}
    other = estimator(make_config("tiny-llama-python", adapter=None, length=64, adapters=changed))
    entry = found["adapters.adapters.two.r: 16"]
    assert other.estimate(case.plan.shape(4)).needed == entry.needed < memories.needed(case)


def test_the_report_names_the_adapters(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from ludwig_peft_plugin.estimate.report import report
    from ludwig_peft_plugin.estimate.show import show

    config_obj = make_config(adapter=None, adapters=SECTIONS["cat"])
    found = report(config_obj)
    assert found.to_dict()["adapters"] == ["one", "two", "merged"]
    show(found, "config.yaml", Console(width=200))
    assert "in the adapters one, two, merged;" in capsys.readouterr().out
