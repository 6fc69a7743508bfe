"""Every option, set to other values than its default, changes something observable, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from pydantic import ValidationError

from ludwig_peft_plugin.errors import AdapterError


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases made for the tests have no tokenizer, and here get one for `init_text`: a token for each letter."""
    monkeypatch.setattr(
        "ludwig_peft_plugin.model.base_model.load_tokenizer",
        lambda name, trust_remote_code: lambda text: {"input_ids": [ord(letter) % 32 + 3 for letter in text]},
    )


@pytest.mark.usefixtures("tokenizer")
def test_option_takes_effect(option: Any) -> None:
    effects: dict[str, str] = {}
    refusals: dict[str, str] = {}
    values = option.values()
    assert values, "no other value is known: list some in alternatives.py"
    for value in values:
        try:
            changed = option.with_value(value)
            difference = changed.difference(option.baseline())
        except (AdapterError, ConfigValidationError, ValidationError) as error:
            refusals[repr(value)] = str(error)
            continue
        assert difference is not None, f"{value!r} changes nothing"
        effects[repr(value)] = difference
    assert all(option.name in text for text in refusals.values()), f"refused without naming the option: {refusals}"
    assert bool(effects) != option.refused_alone, f"refused: {refusals}, with effect: {effects}"


IDLE: dict[str, dict[str, Any]] = {
    "adamss.final_warmup": {"final_warmup": 10},
    "adamss.init_warmup": {"use_asa": True, "init_warmup": 1000},
    "adamss.svd_threshold": {"svd_threshold": 0.5},
    "adamss.use_dynamic_rank": {"use_dynamic_rank": True},
    "deft.init_scale": {"init_scale": 2.0},
    "lokr.decompose_both": {"decompose_both": True},
    "lokr.rank_dropout_scale": {"rank_dropout_scale": True},
    "oft.eps": {"eps": 0.1},
    "oft.num_cayley_neumann_terms": {"num_cayley_neumann_terms": 2, "use_cayley_neumann": False},
    "psoft.cayley_neumann_eps": {"cayley_neumann_eps": 0.1},
    "psoft.num_cayley_neumann_terms": {"num_cayley_neumann_terms": 2},
    "psoft.psoft_svd_lowrank_niter": {"psoft_svd_lowrank_niter": 2},
    "psoft.random_seed": {"random_seed": 1},
    "tinylora.init_v_bound": {"init_v_bound": 0.5},
}
"""Options, and others, with which they can have no effect."""


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_effect_is_refused(name: str, make_case: Any) -> None:
    kind, _, option = name.partition(".")
    with pytest.raises((AdapterError, ConfigValidationError, ValidationError), match=rf"adapter\.{option}\b"):
        make_case(kind, "qwen2-fp32").attach(**IDLE[name])


def test_every_option_is_tried(options_tried: Any, cells: Any) -> None:
    tried, not_yet, count = options_tried
    assert {kind for kind, _ in tried} | not_yet == cells["types"]
    assert not not_yet, "types without values to try"
    assert len(tried) == count, "an option came or went; see to its values, and count again"


def test_a_value_that_does_nothing_would_be_found(bases: Any, make_case: Any, make_fingerprint: Any) -> None:
    case = make_case("lora", "llama-fp32")
    one, same = (make_fingerprint(case, {"r": 4}) for _ in range(2))
    assert one.difference(same) is None
    other = make_fingerprint(case, {"r": 4, "dropout": 0.3})
    assert one.difference(other) == "training"


pytestmark = [
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]
