"""YAML files in the shapes of Ludwig's own language model examples pass unchanged, and so do the plugin's own."""

from pathlib import Path

import pytest
import yaml
from ludwig.schema.model_types.base import ModelConfig

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").rglob("*.yaml"))
FILES = sorted((Path(__file__).parent / "stock").glob("*.yaml"))


def test_there_are_stock_configs() -> None:
    assert len(FILES) >= 8
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stock_config_is_valid(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    config = ModelConfig.from_dict(given)
    assert config.trainer.type == given["trainer"]["type"]
    assert config.base_model == "tiny-llama-python"
    for section in ("trainer", "generation", "preprocessing"):
        for name, value in given.get(section, {}).items():
            if not isinstance(value, dict | list):
                assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_has_no_problems(path: Path) -> None:
    from ludwig.utils.backward_compatibility import upgrade_config_dict_to_latest_version

    from ludwig_peft_plugin.config.strict import find_problems

    config = upgrade_config_dict_to_latest_version(yaml.safe_load(path.read_text()))
    if config.get("model_type") == "llm":
        assert find_problems(config) == []
    else:
        assert ModelConfig.from_dict(config).model_type == "ecd"
