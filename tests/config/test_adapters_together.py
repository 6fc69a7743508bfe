"""How adapters of an `adapters` section go together is checked before training, as training would find it."""

from collections.abc import Callable
from typing import Any

import pytest
from ludwig.error import ConfigValidationError

LORA = {"type": "lora", "r": 4}
WIDE = {"type": "lora", "r": 8}
Errors = Callable[..., dict[str, str]]


def found(errors: Errors, **section: Any) -> dict[str, str]:
    return errors(adapter=..., adapters=section)


def test_one_prompt_answers_at_a_time(errors: Errors) -> None:
    prompts = {"one": {"type": "prompt_tuning"}, "two": "prompt_tuning"}
    problem = found(errors, adapters=prompts, active=["one", "two"])["adapters.active"]
    assert problem.startswith("one, two: only one prompt_tuning adapter can be active at a time")
    assert found(errors, adapters=prompts, active=["one"]) == {}
    assert found(errors, adapters={"one": LORA, "two": WIDE}, active=["one", "two"]) == {}


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_unequal_ranks_are_added_by_other_ways(errors: Errors, how: str) -> None:
    merge = {"sources": ["one", "two"], "combination_type": how}
    for wide in (WIDE, {**LORA, "rank_pattern": {"q_proj": 8}}):
        problem = found(errors, adapters={"one": LORA, "two": wide}, merge=merge)["adapters.merge.combination_type"]
        assert problem.startswith(f"{how!r} needs equal ranks, and one has 4, two has 8; give one of")
        assert "cat" in problem
    assert found(errors, adapters={"one": LORA, "two": LORA}, merge=merge) == {}


def test_ranks_of_trained_folders_are_theirs(errors: Errors) -> None:
    trained = {**WIDE, "pretrained_adapter_weights": "results/run/model/model_weights"}
    assert found(errors, adapters={"one": LORA, "two": trained}, merge={"sources": ["one", "two"]}) == {}


@pytest.mark.parametrize("how", ["cat", "svd", "ties_svd"])
def test_unequal_ranks_can_be_merged(errors: Errors, how: str) -> None:
    merge = {"sources": ["one", "two"], "combination_type": how}
    assert found(errors, adapters={"one": LORA, "two": WIDE}, merge=merge) == {}


def test_types_that_stand_alone_are_refused(errors: Errors) -> None:
    problems = found(errors, adapters={"one": "adaption_prompt", "two": "adaption_prompt"})
    assert "cannot share a base with others; train it alone" in problems["adapters.adapters.one"]


def test_training_the_base_is_no_adapter_among_others(errors: Errors) -> None:
    for adapters in ({"one": "full"}, {"one": {"type": "full"}, "two": LORA}):
        problem = found(errors, adapters=adapters)["adapters.adapters.one"]
        assert problem == "adapter type `full` cannot share a base with others; train it alone"


def test_types_given_by_name_alone_are_checked_against_the_quantisation(load: Callable[..., Any]) -> None:
    named = {"adapters": {"one": "qlora", "two": "lora"}}
    assert load(adapter=..., adapters=named, trainer={"type": "finetune"}).quantization.bits == 4
    with pytest.raises(ConfigValidationError, match="`frod` cannot be trained on a quantised base"):
        load(adapter=..., adapters={"adapters": {"one": "frod"}}, quantization={"bits": 4})


def test_a_missing_trainer_type_is_for_the_adapters(errors: Errors) -> None:
    problems = errors(adapter=..., adapters={"adapters": {"one": LORA}}, trainer={"batch_size": 2})
    assert "give `finetune` to train the adapters" in problems["trainer.type"]
