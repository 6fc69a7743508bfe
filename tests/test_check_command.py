"""`ludwig-peft check` on configs with one adapter, several and none: what it shows, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ludwig_peft_plugin.cli import app

CONFIG: dict[str, Any] = {
    "model_type": "llm",
    "base_model": "tiny-llama-python",
    "input_features": [{"name": "prompt", "type": "text"}],
    "output_features": [{"name": "output", "type": "text"}],
    "trainer": {"type": "finetune"},
}
LORA = {"type": "lora", "r": 4}


@pytest.fixture
def check(registered: None, tmp_path: Path) -> Any:
    """A function that runs the command on a config and returns exit code, rows of its table and errors."""

    def call(**sections: Any) -> tuple[int, dict[str, str], str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, **sections}), encoding="utf-8")
        done = CliRunner().invoke(app, ["check", str(path)])
        rows = (line.strip("│| ").split("│") for line in done.stdout.splitlines() if line.count("│") == 3)
        return done.exit_code, {name.strip(): value.strip() for name, value in rows}, " ".join(done.stderr.split())

    return call


def test_one_and_none(check: Any) -> None:
    assert check(adapter=LORA)[1]["adapter"] == "lora"
    assert check()[1]["adapter"] == "none: the whole model is trained"
    assert check(trainer={"type": "none"})[1]["adapter"] == "none"


def test_several(check: Any) -> None:
    section = {
        "adapters": {"sql": LORA, "style": {"type": "dora", "r": 8}},
        "active": ["sql", "style"],
        "trained": ["style"],
        "column": "language",
        "merge": {"name": "both", "sources": ["sql", "style"], "combination_type": "cat"},
    }
    code, rows, errors = check(adapters=section)
    assert (code, errors) == (0, "")
    assert rows["adapters"] == "sql (lora), style (dora)"
    assert rows["merged"] == "both: sql, style (cat)"
    assert (rows["active"], rows["trained"]) == ("sql, style", "style")
    assert rows["chosen by column"] == "language"
    assert "adapter" not in rows


def test_several_that_do_not_go_together(check: Any) -> None:
    section = {"adapters": {"sql": LORA, "style": {"type": "ia3"}}, "active": "stile"}
    code, _, errors = check(adapters=section)
    assert code == 1
    assert "adapters.active: 'stile': there is no adapter of this name; give one of sql, style" in errors
    assert "adapters on one base are of one method" in errors
    code, _, errors = check(adapters={"adapters": {"sql": LORA}}, adapter=LORA)
    assert code == 1
    assert "adapters" in errors
    assert "Traceback" not in errors
