"""`ludwig-peft methods`: a row for every registered type, with what its class says and what it trains."""

import json

import pytest
from ludwig.schema.llms.peft import adapter_registry
from typer.testing import CliRunner

from ludwig_peft_plugin.adapters.base import FAMILIES, AdapterConfig
from ludwig_peft_plugin.cli import app


@pytest.fixture(scope="module")
def rows(registered):
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0, result.output
    return {row["type"]: row for row in json.loads(result.stdout)}


def test_every_registered_type_is_a_row_with_its_class_data(rows):
    assert rows.keys() == adapter_registry.keys()
    for name, cls in adapter_registry.items():
        if issubclass(cls, AdapterConfig):
            for option in ("family", "paper", "good_for", "learning_rate", "mergeable", "several", "encoder"):
                assert rows[name][option] == getattr(cls, option), (name, option)
            assert ("4 bit" in rows[name]["quantized"]) == cls.quantized_base
            assert rows[name]["aliases"] == list(cls.aliases)


def test_families_stand_together_in_their_order(rows):
    families = [row["family"] for row in rows.values() if row["family"] in FAMILIES]
    assert families == sorted(families, key=FAMILIES.index)


def test_what_is_trained_is_counted(rows):
    assert rows["lora"]["trained"] == 5 * 8 * ((256 + 256) + (256 + 64))  # r 8 on q and v of five layers
    assert 0 < rows["lora"]["share"] < rows["qlora"]["share"] < 0.1
    assert rows["lora"]["problem"] is None


def test_a_config_counts_its_own_options_on_its_own_base(tmp_path, registered):
    path = tmp_path / "config.yaml"
    path.write_text("base_model: tiny-llama-python\nadapter: {type: lora, r: 16}\n")
    result = CliRunner().invoke(app, ["methods", "--json", "--config", str(path)])
    rows = {row["type"]: row for row in json.loads(result.stdout)}
    assert rows["lora"]["trained"] == 5 * 16 * ((256 + 256) + (256 + 64))


def test_the_table_names_types_and_papers(registered):
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    for text in ("qlora", "reparameterisation", "Hu et al. 2021", "4 bit"):
        assert text in result.stdout


def test_an_unknown_base_is_an_error_of_a_few_lines(registered):
    result = CliRunner().invoke(app, ["methods", "--base_model", "no/such-model-anywhere"])
    assert result.exit_code == 1
    assert "no/such-model-anywhere" in result.stderr
