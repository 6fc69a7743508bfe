"""Options derived from PEFT's configs: kinds, bounds, texts; none is missing; Ludwig's configs stay valid."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import ludwig.schema.llms.peft as stock
import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import adapter_registry
from peft import PeftConfig, PeftType

from ludwig_peft_plugin.adapters.base import FAMILIES
from ludwig_peft_plugin.adapters.peft_method import PeftMethod
from ludwig_peft_plugin.adapters.peft_options import derive, not_offered, own_fields
from ludwig_peft_plugin.adapters.peft_registry import ELSEWHERE, EXCLUDED, methods
from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.config.sections import options

TYPES = {name: cls for name, cls in adapter_registry.items() if issubclass(cls, PeftMethod)}

STOCK = {
    name: getattr(stock, cls)
    for name, cls in {
        "adalora": "AdaloraConfig",
        "ia3": "IA3Config",
        "vera": "VeraAdapterConfig",
        "loha": "LoHaAdapterConfig",
        "lokr": "LoKrAdapterConfig",
        "fourierft": "FourierFTAdapterConfig",
        "boft": "BOFTAdapterConfig",
        "tinylora": "TinyLoraAdapterConfig",
        "c3a": "C3AAdapterConfig",
        "oft": "OFTAdapterConfig",
        "hra": "HRAAdapterConfig",
        "waveft": "WaveFTAdapterConfig",
        "vblora": "VBLoRAAdapterConfig",
    }.items()
}


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class FakeConfig(PeftConfig):
    """What PEFT's configs hold, and a thing no YAML file can."""

    r: int = field(default=4, metadata={"help": "The rank."})
    steps: int = field(default=0, metadata={"help": "Steps. " + "A second sentence that says more. " * 12})
    offset: int = -1
    fake_dropout: float = 0.0
    scale: float = 2.0
    seed: int | None = None
    mode: Literal["one", "two"] = "one"
    colour: Colour = Colour.RED
    bias: str = field(default="none", metadata={"help": "Can be 'none', 'all' or 'fake_only'"})
    scale_pattern: dict | None = field(default_factory=dict)
    size_pattern: dict | None = field(default_factory=dict)
    names: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    tuple_help: bool = field(default=True, metadata={"help": ("In ", "parts.")})
    function: type[Exception] | None = None


@pytest.fixture
def derived() -> dict[str, Any]:
    nothing: dict[str, Any] = {}
    found = derive(
        FakeConfig,
        renamed={"scale": "factor"},
        removed={"names": "why"},
        defaults={"r": 8},
        texts={"mode": "Ours."},
        values=nothing,
    )
    return {entry.name: entry for entry in found}


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("r", [1, 64], [0, 1.5, True, "4", None], "an integer of at least 1"),
        ("steps", [0, 3], [-1, None], "an integer of at least 0"),
        ("offset", [-5, 5], [0.5], "an integer"),
        ("fake_dropout", [0, 0.5], [1, -0.1], "a number from 0 to below 1"),
        ("factor", [1, 0.1], [0, "x"], "a number above 0"),
        ("seed", [None, 7], [1.5], "an integer"),
        ("mode", ["one", "two"], ["three", None], "one of one, two"),
        ("colour", ["red"], ["green"], "one of red, blue"),
        ("bias", ["none", "all", "fake_only"], ["lora_only", None], "one of none, all, fake_only"),
        ("scale_pattern", [None, {"q": 0.5}], [{"q": 0}, []], "a mapping from module names to numbers above 0"),
        ("size_pattern", [None, {"q": 2}], [{"q": 0.5}], "a mapping from module names to integers of at least 1"),
        ("layers_to_transform", [None, 1, [0, 1]], [-1, []], "a layer number or a list of them, from 0"),
    ],
)
def test_kinds_and_bounds(derived: Any, name: str, good: list[Any], bad: list[Any], words: str) -> None:
    from jsonschema import Draft7Validator

    values = derived[name].values
    assert values.expects == words
    assert all(Draft7Validator(values.schema).is_valid(value) for value in good)
    assert not any(Draft7Validator(values.schema).is_valid(value) for value in bad)


def test_texts_defaults_and_names(derived: Any) -> None:
    assert (derived["r"].default, derived["r"].description) == (8, "Rank of the update.")
    assert derived["colour"].default == "red"
    assert derived["scale_pattern"].default is None
    assert derived["mode"].description == "Ours."
    assert derived["tuple_help"].description == "In parts."
    assert derived["steps"].description.startswith("Steps. A second")
    assert len(derived["steps"].description) < 260
    assert derived["factor"].field == "scale"
    assert {"names", "scale", "function", "peft_type", "task_type"}.isdisjoint(derived)


def test_what_is_no_option_has_a_reason() -> None:
    reasons = not_offered(FakeConfig, {"names": "why"}, {})
    assert reasons["names"] == "why"
    assert "which a config file cannot hold" in reasons["function"]
    assert "set by PEFT" in reasons["peft_type"]
    assert "r" not in reasons


@pytest.mark.parametrize("name", TYPES)
def test_each_field_of_peft_is_an_option_or_has_a_reason(name: str) -> None:
    cls = TYPES[name]
    offered = {cls.renamed.get(key, key): key for key in own_fields(cls.peft_config())}
    absent = cls.not_offered()
    for option, key in offered.items():
        assert (option in cls.model_fields) != (key in absent) or key in cls.removed, key
    assert all(reason for reason in absent.values())
    assert cls.removed.keys() <= own_fields(cls.peft_config()).keys()


@pytest.mark.parametrize("name", TYPES)
def test_each_type_says_what_it_is(name: str) -> None:
    cls = TYPES[name]
    assert cls.family in FAMILIES
    assert "https://" in cls.paper
    assert cls.good_for
    assert cls.learning_rate
    assert cls.title
    assert cls.summary.endswith(".")
    assert cls.quantized_base or cls.quantized_reason
    for option in options(cls).values():
        if option.name not in ("type", "pretrained_adapter_weights", "postprocessor"):
            assert 0 < len(option.description) < 400, option.name


@pytest.mark.parametrize("name", TYPES)
def test_defaults_make_the_peft_config(name: str) -> None:
    adapter = AdapterSelection().resolve(name)
    config = adapter.to_config(task_type="CAUSAL_LM")
    assert config.peft_type == PeftType(TYPES[name].peft_type)
    assert config.task_type == "CAUSAL_LM"
    for option, key in ((TYPES[name].renamed.get(key, key), key) for key in own_fields(TYPES[name].peft_config())):
        value = getattr(adapter, option, None)
        if value is not None and key not in TYPES[name].removed and option != "target_modules":
            assert getattr(config, key) == value, option


@pytest.mark.parametrize("name", STOCK)
def test_configs_of_ludwigs_own_type_stay_valid(name: str) -> None:
    written_out = STOCK[name]().to_dict()
    adapter = AdapterSelection().resolve(written_out)
    assert type(adapter) is TYPES[name]
    assert set(written_out) <= set(TYPES[name].model_fields)
    adapter.to_config(task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "vera", "r": 0}, "adapter.r: 0 is not valid, it must be an integer of at least 1"),
        ({"type": "loha", "rank_dropout": 1.0}, "adapter.rank_dropout: 1.0 is not valid"),
        ({"type": "road", "variant": "road_3"}, "one of road_1, road_2, road_4"),
        ({"type": "waveft", "wavelet_family": "db99"}, "wavelet_family: 'db99' is not valid"),
        ({"type": "hira", "r": "x"}, "adapter.r: 'x' is not valid"),
        ({"type": "loha", "target_modules": "(", "r": 2}, "target_modules: '(' is not a regular expression"),
        (
            {"type": "loha", "target_modules": ".*q", "layers_to_transform": 1},
            "does not work with a regular expression",
        ),
        ({"type": "oft", "r": 4, "oft_block_size": 8}, "say the same in two ways"),
        ({"type": "boft", "boft_block_num": 4, "boft_block_size": 8}, "say the same in two ways"),
        ({"type": "adalora", "target_r": 12}, "target_r: 12 is not below init_r: 12"),
        ({"type": "adalora", "r": 6, "init_r": 10}, "two names of one option"),
        ({"type": "adalora", "use_dora": True}, "AdaLoRA has no DoRA"),
        ({"type": "supertuning", "lora_alpha": 4}, "has no effect without r"),
        ({"type": "vblora", "topk": 9, "num_vectors": 4}, "topk: 9 is more than num_vectors: 4"),
        ({"type": "gralora", "r": 5}, "not a multiple of gralora_k"),
    ],
)
def test_wrong_values_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigValidationError) as error:
        AdapterSelection().resolve(section)
    assert message in str(error.value)


def test_every_method_of_peft_is_a_type_or_excluded_with_a_reason() -> None:
    found = methods()
    assert len(found) > 40
    made = {cls.peft_type for cls in TYPES.values()}
    for kind, reason in found.items():
        if reason is None:
            name = ELSEWHERE.get(kind, kind.lower())
            assert kind in made or name in adapter_registry, kind
        else:
            assert len(reason.split()) > 4, kind
    assert found.keys() >= EXCLUDED.keys()
