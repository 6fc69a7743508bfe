"""Exports of an adapter with a prompt for each task are compared as each task, and their card says how to name one."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.adapter import WEIGHTS, AdapterFormat
from ludwig_peft_plugin.export.result import ExportOptions, Written
from ludwig_peft_plugin.export.run import export_all
from ludwig_peft_plugin.export.summary import TrainingSummary
from ludwig_peft_plugin.export.verify import logits_of, prompt_tokens

TEXTS = ["def add(a, b):\n", "### Instruction: add\n### Input: 1, 2\n### Response: "]
OPTIONS = {"type": "multitask_prompt_tuning", "task_column": "kind", "num_tasks": 3, "num_virtual_tokens": 4}


@pytest.fixture
def make_tasked(registered: None, make_llm: Any) -> Any:
    """A function that returns a model with a prompt of its own for each of three tasks."""
    from ludwig_peft_plugin.config.adapter_types import AdapterSelection

    def make(**options: Any) -> Any:
        llm = make_llm(adapter=False, export=["adapter"])
        config: Any = AdapterSelection().resolve({**OPTIONS, **options})
        llm.model, llm.config_obj.adapter = attach_adapter(llm.model, config), config
        encoder = llm.model.prompt_encoder["default"]
        with torch.no_grad():
            encoder.prefix_task_rows.normal_()
            encoder.prefix_task_cols.normal_()
        return llm

    return make


def test_each_prompt_and_each_task_is_compared(make_tasked: Any) -> None:
    llm = make_tasked()
    tokens = prompt_tokens(llm, TEXTS)
    found = logits_of(llm.model, tokens)
    assert [len(logits) - OPTIONS["num_virtual_tokens"] for logits in found] == [
        tokens[turn].shape[1] for turn in (0, 1, 0)
    ]
    assert not torch.equal(found[0], found[2]), "tasks 0 and 2 answer the same prompt alike"
    assert len(logits_of(llm.model, [*tokens, *tokens])) == 4


def test_an_export_is_verified_and_loads_with_plain_peft(
    make_tasked: Any, summary: TrainingSummary, tmp_path: Path
) -> None:
    llm = make_tasked()
    (result,) = export_all(llm, str(tmp_path), summary, TEXTS)
    expected = [tensor.shape[0] for tensor in logits_of(llm.model, prompt_tokens(llm, TEXTS))]
    manifest = json.loads((Path(result.folder) / "ludwig_export.json").read_text(encoding="utf-8"))
    assert manifest["verification"]["tokens"] == sum(expected)
    assert result.max_abs_difference < 1e-4


def test_one_task_that_is_wrong_is_found(
    make_tasked: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = AdapterFormat.write

    def damaging(self: AdapterFormat, llm: Any, folder: Path, options: ExportOptions) -> Written:
        written = write(self, llm, folder, options)
        weights = load_file(folder / WEIGHTS)
        weights["prefix_task_rows"][2] += 0.5
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return written

    monkeypatch.setattr(AdapterFormat, "write", damaging)
    with pytest.raises(ExportError, match="is not the trained model"):
        export_all(make_tasked(), str(tmp_path), summary, TEXTS)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's remark on every prompt it generates after
def test_the_card_names_the_tasks_and_its_code_answers(
    make_tasked: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_tasked(tasks=["explain", "write", "mend"])
    (result,) = export_all(llm, str(tmp_path), summary, TEXTS)
    card = (Path(result.folder) / "README.md").read_text(encoding="utf-8")
    assert '# the task, from 0 to 2, 0 is "explain", 1 is "write", 2 is "mend"\n' in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(result.folder)
    code = code.replace('"tiny-untied"', repr(llm.config_obj.base_model)).replace("_tokens=64", "_tokens=3")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue()
