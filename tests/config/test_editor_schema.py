"""The JSON schema for editors accepts what is valid, refuses what is not, and says where."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from ludwig.schema import export_schema as stock

from ludwig_peft_plugin.config import editor_schema

ROOT = Path(__file__).parent.parent.parent
YAML_FILES = sorted(
    path
    for folder in (ROOT / "configs", ROOT / "tests" / "config" / "stock")
    for path in folder.rglob("*.yaml")
    if yaml.safe_load(path.read_text()).get("model_type") == "llm"
)


@pytest.fixture(scope="module")
def validator(registered: None) -> Draft7Validator:
    schema = editor_schema.editor_schema()
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def faults(validator: Draft7Validator, config: dict[str, Any]) -> list[str]:
    return sorted(".".join(map(str, error.absolute_path)) for error in validator.iter_errors(config))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_yaml_files_are_valid(validator: Draft7Validator, path: Path) -> None:
    assert faults(validator, yaml.safe_load(path.read_text())) == []


def test_valid_configs(validator: Draft7Validator, config: Any) -> None:
    assert faults(validator, config()) == []
    assert faults(validator, config(adapter="qlora", export=["adapter", {"format": "merged"}])) == []
    assert faults(validator, config(adapter={"type": "lora", "target_modules": "all-linear"})) == []
    assert faults(validator, config(generation=None, trainer={"type": "finetune", "learning_rate": "auto"})) == []
    assert faults(validator, config(adapter=..., adapters={"adapters": {"a": {"type": "dora"}}})) == []


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        ({"traner": {}}, ""),
        ({"adapter": {"type": "lora", "rr": 1}}, "adapter"),
        ({"adapter": {"type": "lora", "r": 0}}, "adapter.r"),
        ({"adapter": {"type": "lorra"}}, "adapter.type"),
        ({"adapter": "lorra"}, "adapter"),
        ({"trainer": {"type": "finetune", "learning_ratee": 1}}, "trainer"),
        ({"trainer": {"type": "finetune", "learning_rate": "fast"}}, "trainer.learning_rate"),
        ({"trainer": {"type": "finetune", "modality_dropout": 0.5}}, "trainer"),
        ({"trainer": {"type": "finetune", "optimizer": {"type": "adamw", "beta": 1}}}, "trainer.optimizer"),
        ({"quantization": {"bits": 3}}, "quantization.bits"),
        ({"prompt": {"retrieval": {"kk": 1}}}, "prompt.retrieval"),
        ({"export": [{"format": "gguf"}]}, "export.0.format"),
        ({"export": ["gguf"]}, "export.0"),
        ({"input_features": [{"name": "a", "type": "text", "colunm": "b"}]}, "input_features.0"),
        ({"model_type": "llms"}, "model_type"),
        ({"base_model": ...}, ""),
    ],
)
def test_mistakes_are_found_at_their_place(validator: Draft7Validator, config: Any, sections: Any, place: str) -> None:
    assert faults(validator, config(**sections)) == [place]


def test_options_have_descriptions_and_defaults(validator: Draft7Validator) -> None:
    schema: dict[str, Any] = validator.schema  # type: ignore[assignment]
    precision = schema["properties"]["precision"]
    assert precision["default"] == "auto"
    assert "float32" in precision["enum"]
    assert "bfloat16" in precision["description"]
    rank = schema["definitions"]["LoraConfig"]["properties"]["r"]
    assert (rank["type"], rank["minimum"], rank["default"]) == ("integer", 1, 8)
    assert rank["description"]


def test_written_file_is_the_schema(tmp_path: Path, validator: Draft7Validator) -> None:
    editor_schema.write_schema(tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(json.dumps(validator.schema))


def test_export_schema_lists_what_the_plugin_adds() -> None:
    exported = editor_schema.export_schema(stock.export_schema)
    llm = exported("llm", strip_metadata=True)
    assert {"dataset", "precision", "export"} <= set(llm["properties"])
    assert {"qlora", "dora"} <= set(llm["properties"]["adapter"]["then"]["properties"]["type"]["enum"])
    assert "combiner" in exported("ecd")["properties"]


def test_combined_schema_validates_both_model_types(config: Any) -> None:
    combined = editor_schema.export_combined_schema(stock.export_combined_schema)(strip_metadata=True)
    validator = Draft7Validator(combined)
    ecd = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "b", "type": "binary"}],
        "trainer": {"epochs": 3},
    }
    assert faults(validator, ecd) == []
    assert faults(validator, config()) == []
    assert faults(validator, config(adapter={"type": "lora", "rr": 1})) == ["adapter"]
