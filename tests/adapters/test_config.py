"""The schema of lora, qlora and dora: stock configs, aliases, JSON schema, and combinations that are refused."""

import dataclasses
import json
from typing import Any

import peft
import pytest
from jsonschema import Draft7Validator
from ludwig.schema.llms.peft import get_adapter_conds
from ludwig.schema.utils import unload_jsonschema_from_config_class
from peft.tuners.lora.config import CordaConfig
from pydantic import ValidationError

from ludwig_peft_plugin.adapters.lora_fields import PEFT_FIELDS, UNSUPPORTED
from ludwig_peft_plugin.adapters.lora_init import METHODS
from ludwig_peft_plugin.adapters.lora_sections import CordaSection, EvaSection, LoftQSection, LoraGASection
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig

ALL = (LoraConfig, QLoraConfig, DoraConfig)
SECTIONS = {
    "eva_config": (peft.EvaConfig, EvaSection),
    "corda_config": (CordaConfig, CordaSection),
    "loftq_config": (peft.LoftQConfig, LoftQSection),
    "lora_ga_config": (peft.LoraGAConfig, LoraGASection),
}

STOCK_SAVED = {
    "type": "lora",
    "pretrained_adapter_weights": None,
    "postprocessor": {"merge_adapter_into_base_model": False, "progressbar": False},
    "r": 8,
    "alpha": 16,
    "dropout": 0.05,
    "bias_type": "none",
    "target_modules": None,
    "use_rslora": False,
    "use_dora": False,
    "loraplus_lr_ratio": None,
    "init_lora_weights": "default",
    "eva_config": None,
    "loftq_config": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "layer_replication": None,
}
"""What Ludwig 0.17 writes to model_hyperparameters.json for `adapter: lora`."""


def message(cls: Any, **options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({"type": cls.type, **options})
    error = caught.value.errors()[0]
    return str(error.get("ctx", {}).get("error", error["msg"]))


def json_schema_accepts(cls: Any, section: dict[str, Any]) -> bool:
    schema = unload_jsonschema_from_config_class(cls)
    json.dumps(schema)
    return bool(Draft7Validator(schema).is_valid(section))


def test_every_field_of_pefts_lora_is_an_option_or_has_a_reason() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    reasons = {name for name in UNSUPPORTED if "." not in name}
    assert fields == PEFT_FIELDS.keys() | reasons
    assert not PEFT_FIELDS.keys() & reasons
    assert all(len(reason) > 10 for reason in UNSUPPORTED.values())


def test_every_option_of_the_table_exists() -> None:
    options = set().union(*(cls.model_fields for cls in ALL))
    assert set(PEFT_FIELDS.values()) <= options
    own = {"type", "pretrained_adapter_weights", "postprocessor", "loraplus_lr_ratio", "bias"}
    assert options - set(PEFT_FIELDS.values()) == own


@pytest.mark.parametrize("name", SECTIONS)
def test_every_field_of_a_section_is_an_option_or_has_a_reason(name: str) -> None:
    peft_class, section = SECTIONS[name]
    fields = {field.name for field in dataclasses.fields(peft_class)}
    reasons = {key.removeprefix(f"{name}.") for key in UNSUPPORTED if key.startswith(f"{name}.")}
    assert fields == set(section.model_fields) | reasons
    assert not set(section.model_fields) & reasons


def test_a_config_saved_by_ludwig_validates_and_stays_the_same() -> None:
    config = LoraConfig.model_validate(dict(STOCK_SAVED))
    assert json_schema_accepts(LoraConfig, STOCK_SAVED)
    assert {name: config.to_dict()[name] for name in STOCK_SAVED} == STOCK_SAVED


@pytest.mark.parametrize("cls", ALL)
def test_a_saved_config_loads_again(cls: Any) -> None:
    first = cls.model_validate(
        {"type": cls.type, "init_lora_weights": "eva", "eva_config": {"rho": 1.5}, "bias": "all"}
    )
    saved = json.loads(json.dumps(first.to_dict()))
    assert json_schema_accepts(cls, saved)
    assert cls.model_validate(saved).to_dict() == first.to_dict()


def test_defaults() -> None:
    lora, qlora, dora = (cls.model_validate({"type": cls.type}) for cls in ALL)
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (8, 16, 0.05, None)
    assert (qlora.r, qlora.alpha, qlora.dropout, qlora.target_modules) == (16, 32, 0.05, "all-linear")
    assert (dora.r, dora.alpha, dora.dropout, dora.target_modules) == (16, 32, 0.05, "all-linear")
    assert dora.to_config().use_dora
    assert not qlora.to_config().use_dora
    assert LoraConfig(r=5).alpha == 10


def test_bias_is_another_name_of_bias_type() -> None:
    for options in ({"bias": "all"}, {"bias_type": "all"}, {"bias": "all", "bias_type": "all"}):
        config = LoraConfig.model_validate({"type": "lora", **options})
        assert config.bias_type == "all"
        assert config.to_config().bias == "all"
    assert "two names of one option" in message(LoraConfig, bias="all", bias_type="lora_only")


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("target_modules", [["q_proj"], "all-linear", r".*\.q_proj", None], [3, [], ["q_proj", 1], ""]),
        ("exclude_modules", [["q_proj"], r".*\.q_proj", None], [3, []]),
        ("layers_to_transform", [0, [0, 2], None], [-1, [], "0", [0.5]]),
        ("layers_pattern", [None], [3]),
        ("rank_pattern", [{"q_proj": 4}, {}, None], [{"q_proj": 0}, {"q_proj": "4"}, [4]]),
        ("alpha_pattern", [{"q_proj": 4}, {"q_proj": 0.5}, None], [{"q_proj": 0}, 4]),
        ("modules_to_save", [["lm_head"], None], ["lm_head", []]),
        ("trainable_token_indices", [[1, 2], {"embed_tokens": [1]}, None], [[-1], {"embed_tokens": 1}, 3]),
        ("layer_replication", [[[0, 2], [1, 3]], None], [[[0]], [[0, 1, 2]], [0, 1]]),
        ("loraplus_lr_ratio", [16, 0.5, None], [0, -1, "16"]),
        ("init_lora_weights", ["pissa_niter_4", "eva", True, False, *METHODS], ["pissa_niter_", "pisa", None, 1.5]),
    ],
)
def test_value_types_in_class_and_json_schema(option: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert json_schema_accepts(LoraConfig, {option: value}), value
        assert LoraConfig.model_validate({"type": "lora", option: value})
    for value in bad:
        assert not json_schema_accepts(LoraConfig, {option: value}), value
        if value is not None:
            text = message(LoraConfig, **{option: value})
            assert f"adapter.{option}" in text
            assert "must be" in text


def test_ludwigs_adapter_schema_lists_the_options() -> None:
    conds = {cond["if"]["properties"]["type"]["const"]: cond["then"]["properties"] for cond in get_adapter_conds()}
    for cls in ALL:
        assert set(cls.model_fields) - {"type"} <= conds[cls.type].keys()
        undescribed = [
            name for name in cls.model_fields if name not in STOCK_SAVED and not describes(conds[cls.type], name)
        ]
        assert not undescribed


def describes(properties: dict[str, Any], name: str) -> bool:
    return bool(properties[name].get("description")) or "oneOf" in properties[name]


@pytest.mark.parametrize(
    ("cls", "options", "parts"),
    [
        (LoraConfig, {"eva_config": {}}, ["eva_config has no effect", "init_lora_weights: eva"]),
        (LoraConfig, {"init_lora_weights": "eva", "corda_config": {}}, ["corda_config has no effect"]),
        (LoraConfig, {"loftq_config": {"loftq_bits": 4}}, ["loftq_config has no effect"]),
        (LoraConfig, {"lora_ga_config": {}}, ["lora_ga_config has no effect"]),
        (
            QLoraConfig,
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
            ["loftq_config.loftq_iter", "use 1"],
        ),
        (LoraConfig, {"init_lora_weights": "orthogonal", "r": 5}, ["even ranks", "not 5"]),
        (LoraConfig, {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, ["even ranks", "not 3"]),
        (LoraConfig, {"lora_bias": True, "init_lora_weights": "pissa"}, ["lora_bias", "pissa"]),
        (DoraConfig, {"lora_bias": True}, ["lora_bias", "DoRA"]),
        (LoraConfig, {"lora_bias": True, "use_dora": True}, ["lora_bias", "DoRA"]),
        (LoraConfig, {"init_lora_weights": "eva", "trainable_token_indices": [1]}, ["eva", "trainable_token_indices"]),
        (DoraConfig, {"init_lora_weights": "mica"}, ["mica", "DoRA"]),
        (LoraConfig, {"init_lora_weights": "mica", "loraplus_lr_ratio": 4}, ["loraplus_lr_ratio", "mica"]),
        (LoraConfig, {"init_lora_weights": "pissa", "layer_replication": [[0, 2]]}, ["layer_replication", "pissa"]),
        (LoraConfig, {"layer_replication": [[2, 2]]}, ["layer_replication", "empty"]),
        (LoraConfig, {"layers_pattern": "layers"}, ["layers_pattern has no effect", "layers_to_transform"]),
        (LoraConfig, {"target_modules": ".*q_proj", "layers_to_transform": 0}, ["layers_to_transform", "expression"]),
        (LoraConfig, {"target_modules": "(q_proj"}, ["target_modules", "not a regular expression"]),
        (LoraConfig, {"exclude_modules": "(q_proj"}, ["exclude_modules", "not a regular expression"]),
        (LoraConfig, {"target_parameters": ["mlp.weight"]}, ["target_parameters", "dropout: 0.05", "dropout: 0"]),
        (DoraConfig, {"target_parameters": ["mlp.weight"], "dropout": 0.0}, ["target_parameters", "DoRA"]),
        (
            LoraConfig,
            {"target_parameters": ["w"], "dropout": 0.0, "init_lora_weights": "olora"},
            ["target_parameters", "olora"],
        ),
    ],
)
def test_combinations_without_effect_are_refused(cls: Any, options: dict[str, Any], parts: list[str]) -> None:
    text = message(cls, **options)
    assert text.startswith("adapter.")
    assert all(part in text for part in parts), text
    assert len(text) < 300


def test_true_and_false_are_the_peft_spellings_of_two_initialisations() -> None:
    assert LoraConfig(init_lora_weights=True).init_lora_weights == "default"
    assert LoraConfig(init_lora_weights=False).init_lora_weights == "random"
    assert LoraConfig(init_lora_weights=False).to_config().init_lora_weights is False


def test_needs_data() -> None:
    reading = {name for name in METHODS if LoraConfig(init_lora_weights=name).needs_data}
    assert reading == {"eva", "corda", "lora_ga"}
    assert not LoraConfig(init_lora_weights="eva", pretrained_adapter_weights="folder").needs_data


def test_arguments_ludwig_passes_and_peft_does_not_know_are_ignored() -> None:
    config = LoraConfig().to_config(task_type="CAUSAL_LM", tokenizer_name_or_path="x", target_modules=["k_proj"])
    assert config.target_modules == {"k_proj"}
    assert config.task_type == "CAUSAL_LM"


def test_the_peft_config_alone_says_what_was_asked() -> None:
    """Ludwig builds adapters of text encoders, and of `adapters:`, from the PEFT config alone."""
    config = LoraConfig(target_modules=["k_proj"], init_lora_weights="pissa_niter_3").to_config()
    assert config.target_modules == {"k_proj"}
    assert config.init_lora_weights == "pissa_niter_3"
    assert QLoraConfig().to_config().target_modules == "all-linear"
    eva = LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.5}).to_config()
    assert eva.eva_config.rho == 1.5
