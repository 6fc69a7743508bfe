"""The tables of docs/memory.md are what the command says today, to a tenth; a change that moves them shows here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
ROWS = {
    match[1]: (int(match[2].replace(",", "")), float(match[3]), float(match[4]))
    for match in re.finditer(r"^\| `(\w+\.yaml)` \| ([\d,]+) \|.*\| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
}


def test_every_shipped_config_has_a_row() -> None:
    """Of the configs of one language model: not of a search over several, nor of a model with encoders."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml")}
    single = {name for name, text in texts.items() if "model_type: llm" in text and "\nhyperopt:" not in text}
    assert set(ROWS) == single


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_shipped_configs(name: str, registered: None, bases: Any) -> None:
    from ludwig_peft_plugin.estimate.report import opened_config, report

    described = Path(bases.llama_8b()) if name.startswith("llama_8b") else None
    with opened_config(ROOT / "configs" / name, described) as config_obj:
        estimate = report(config_obj).estimate
    tokens, peak, needed = ROWS[name]
    assert estimate.shape.tokens == tokens
    assert estimate.peak / GIB == pytest.approx(peak, rel=0.1)
    assert estimate.needed / GIB == pytest.approx(needed, rel=0.1)


def test_every_option_of_the_command_is_explained() -> None:
    import inspect

    from ludwig_peft_plugin import cli

    options = set(inspect.signature(cli.estimate).parameters) - {"config", "as_json"}
    for name in options | {"json"}:
        assert f"`--{name.replace('_', '-')}" in PAGE
