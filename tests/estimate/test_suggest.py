"""Each suggestion lowers the memory by what it says, as an estimate of the changed YAML shows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

GIB = 2**30


def case_of(config_obj: Any, size: int = 4) -> tuple[Any, Any]:
    """Return what is estimated and what estimates it."""
    from ludwig_peft_plugin.estimate.batch import batch_plan
    from ludwig_peft_plugin.estimate.memory import Estimator
    from ludwig_peft_plugin.estimate.suggest import Case, Memories

    made = Estimator(config_obj)
    return Case(config_obj, batch_plan(config_obj, made.llm.model_config), size), Memories(made)


@pytest.fixture(autouse=True)
def small_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small, and so are the savings."""
    monkeypatch.setattr("ludwig_peft_plugin.estimate.suggest.WORTH_NAMING", 1)


def changed(settings: dict[str, Any], text: str) -> dict[str, Any]:
    """Return settings with the options of a suggestion's text, as a user would write them into the YAML."""
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(settings))
    for part in re.split(r", (?=trainer\.)", text):
        name, value = part.split(": ", 1)
        *sections, option = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[option] = yaml.safe_load(value)
    return result


SETTINGS: dict[str, Any] = {
    "base": "tiny-llama-python",
    "length": 256,
    "adapter": {"type": "lora", "r": 16, "dropout": 0.0, "target_modules": "all-linear"},
    "precision": "float32",
    "trainer": {"batch_size": 4, "optimizer": {"type": "adamw"}},
}


def test_each_saves_what_it_says(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import suggestions

    case, memories = case_of(make_config(**SETTINGS))
    found = suggestions(case, memories.needed)
    assert {entry.change.kind for entry in found} == {
        "precision",
        "quantization",
        "checkpointing",
        "batch",
        "rows",
        "optimizer",
        "rank",
    }
    assert [entry.saves for entry in found] == sorted((entry.saves for entry in found), reverse=True)
    before = memories.needed(case)
    for entry in found:
        if entry.change.kind == "rows":
            settings = {**SETTINGS, "length": SETTINGS["length"] // 2}
            assert entry.change.text == "preprocessing.global_max_sequence_length: 128"
        else:
            settings = changed(SETTINGS, entry.change.text)
        other, others = case_of(make_config(**settings), settings["trainer"]["batch_size"])
        assert others.needed(other) == entry.needed == before - entry.saves, entry.change.text
        assert entry.saves > 0


def test_the_batch_changes_as_little_as_fits(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import suggestions

    case, memories = case_of(make_config(**{**SETTINGS, "trainer": {"batch_size": 16}}), 16)

    def suggested(available: int | None) -> str:
        found = suggestions(case, memories.needed, available)
        return next(entry.change.text for entry in found if entry.change.kind == "batch")

    half = memories.needed(type(case)(case.config_obj, replace(case.plan, accumulation=2), 8))
    assert suggested(half) == "trainer.batch_size: 8, trainer.gradient_accumulation_steps: 2"
    assert suggested(0) == "trainer.batch_size: 1, trainer.gradient_accumulation_steps: 16"


def test_what_is_set_already_is_not_suggested(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import changes

    lean = {
        "adapter": {"type": "qlora", "r": 1},
        "trainer": {
            "batch_size": 1,
            "enable_gradient_checkpointing": True,
            "checkpoint_offload": True,
            "embedding_offload": True,
            "optimizer": {"type": "paged_adamw_8bit"},
        },
    }
    case, _ = case_of(make_config(length=32, **lean), 1)  # the embedding is not the output matrix too
    assert [change.text for change in changes(case)] == []


def test_double_quantisation_offloading_and_tokens(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import changes

    settings = {
        "adapter": {"type": "qlora", "r": 1},
        "quantization": {"bits": 4, "bnb_4bit_use_double_quant": False},
        "trainer": {
            "batch_size": 1,
            "tokens_per_batch": 512,
            "enable_gradient_checkpointing": True,
            "checkpoint_layers": 0.5,
        },
    }
    case, _ = case_of(make_config(length=64, **settings), 512)
    texts = [change.text for change in changes(case)]
    assert "quantization.bnb_4bit_use_double_quant: true" in texts
    assert "trainer.checkpoint_offload: true" in texts
    assert "trainer.checkpoint_layers: 1.0" in texts
    assert "trainer.embedding_offload: true" in texts
    assert "trainer.tokens_per_batch: 256, trainer.gradient_accumulation_steps: 2" in texts


def test_what_cannot_be_done_is_not_suggested(make_config: Any) -> None:
    """The shipped model's embedding is its output matrix too, so it has to stay on the GPU."""
    from ludwig_peft_plugin.estimate.suggest import changes, suggestions

    case, memories = case_of(make_config("tiny-llama-python"))
    assert "embedding" in {change.kind for change in changes(case)}
    assert "embedding" not in {entry.change.kind for entry in suggestions(case, memories.needed)}


def test_full_fine_tuning_is_told_of_adapters(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import suggestions

    case, memories = case_of(make_config("tiny-llama-python", adapter=None))
    found = suggestions(case, memories.needed)
    assert found[0].change.text == "adapter: {type: lora}"
    assert not any(entry.change.kind == "quantization" for entry in found)


def test_changes_are_combined_until_they_fit(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.suggest import combination, suggestions

    case, memories = case_of(make_config(**SETTINGS))
    single = suggestions(case, memories.needed)
    best = single[0].needed
    chosen, total = combination(case, single, memories.needed, best - 1)
    assert len(chosen) > 1
    assert total < best
    everything, least = combination(case, single, memories.needed, 0)
    assert least <= total
    assert len(everything) >= len(chosen)
    assert combination(case, single, memories.needed, 10 * GIB) == ([], memories.needed(case))
