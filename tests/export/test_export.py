"""`export_all` end to end: what it writes loads in plain libraries to the trained model, or it is an error."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export import merged
from ludwig_peft_plugin.export.formats import ExportFormat, _formats, register_format
from ludwig_peft_plugin.export.result import ExportOptions, Written
from ludwig_peft_plugin.export.run import check_exports, export_all
from ludwig_peft_plugin.export.summary import TrainingSummary
from ludwig_peft_plugin.export.verify import compare, logits_of, prompt_tokens
from ludwig_peft_plugin.model.base_model import load_base_model, load_model_config

BOTH: list[Any] = ["adapter", {"format": "merged"}]
TEXTS = ["### Instruction: add\n### Input: 1, 2\n### Response: ", "def add(a, b):\n"]


def largest(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def texts_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja", ".txt", ".yaml")]
    return {path.name: path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_both_formats_load_in_plain_libraries(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, bits: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(bits=bits, tied=True, export=BOTH)
    tokens = prompt_tokens(llm, TEXTS)
    trained = logits_of(llm.model, tokens)
    random_state = torch.get_rng_state()

    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        results = export_all(llm, str(tmp_path / "run"), summary, TEXTS)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(llm.model, PeftModel)
    assert llm.model.training
    assert largest(logits_of(llm.model, tokens), trained) == 0.0
    assert [result.format for result in results] == ["adapter", "merged"]
    adapter, merged_folder = (Path(result.folder) for result in results)
    assert adapter == tmp_path / "run" / "exported" / "adapter"
    assert str(merged_folder) in caplog.text

    base = load_base_model(llm.config_obj, load_model_config(llm.config_obj), torch.device("cpu"))
    assert largest(logits_of(PeftModel.from_pretrained(base, str(adapter)), tokens), trained) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(merged_folder)
    assert largest(logits_of(plain, tokens), trained) < 1e-4
    assert not hasattr(plain.config, "quantization_config")
    for result in results:
        assert result.max_abs_difference < 1e-4
        assert result.mean_kl < 1e-8
        assert result.change_kept == (None if result.format == "adapter" else pytest.approx(1.0, abs=1e-6))
        assert result.dtype == "float32"
        assert result.seconds > 0
        folder = Path(result.folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(TEXTS)["input_ids"] == llm.tokenizer(TEXTS)["input_ids"]
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        assert list(folder.glob("*.safetensors"))
        assert (folder / "loss_curve.png").stat().st_size > 5000
        for name, text in texts_of(folder).items():
            assert str(tmp_path.parent.parent) not in text, name
            assert "secret-place" not in text, name
            assert "hf_aaaa" not in text, name
        found = json.loads((folder / "ludwig_export.json").read_text())
        assert found["verification"]["max_abs_difference"] == result.max_abs_difference


def test_nothing_to_export(make_llm: Any, summary: TrainingSummary, tmp_path: Path) -> None:
    assert export_all(make_llm(), str(tmp_path / "run"), summary) == []
    assert not (tmp_path / "run").exists()


def test_dtype_and_path(make_llm: Any, summary: TrainingSummary, tmp_path: Path) -> None:
    entries = [
        SimpleNamespace(format="adapter", path="a", dtype="bfloat16", tolerance=None),
        SimpleNamespace(format="merged", path="deep/er/m", dtype="float16", tolerance=None),
    ]
    llm = make_llm(export=entries)
    results = export_all(llm, str(tmp_path), summary)
    assert [result.dtype for result in results] == ["bfloat16", "float16"]
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "deep/er/m").dtype == torch.float16
    assert 1e-6 < results[1].comparison.relative_difference < results[1].tolerance
    llm.config_obj.export = [{"format": "merged", "dtype": "float16", "tolerance": 1e-6, "path": "strict"}]
    with pytest.raises(ExportError, match=r"is not the trained model.*1e-06 is allowed"):
        export_all(llm, str(tmp_path), summary)


def test_a_bfloat16_model(make_llm: Any, summary: TrainingSummary, tmp_path: Path) -> None:
    llm = make_llm(precision="bfloat16", bits=4, export=[*BOTH, {"format": "merged", "dtype": "float32", "path": "f"}])
    adapter, half, full = export_all(llm, str(tmp_path), summary)
    assert adapter.max_abs_difference == 0.0
    assert (half.dtype, full.dtype) == ("bfloat16", "float32")
    assert half.change_kept == pytest.approx(1.0, abs=0.02)
    assert full.change_kept == pytest.approx(1.0, abs=1e-6)


def test_a_change_that_rounding_takes_away_is_said(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(precision="bfloat16", export=["merged"])
    for name, parameter in llm.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    (result,) = export_all(llm, str(tmp_path), summary)
    assert result.change_kept is not None
    assert result.change_kept < 0.9
    assert "Use dtype: float32" in caplog.text


def test_full_fine_tuning(make_llm: Any, summary: TrainingSummary, tmp_path: Path) -> None:
    llm = make_llm(adapter=False, export=["merged"])
    (result,) = export_all(llm, str(tmp_path), summary)
    assert result.max_abs_difference == 0.0
    llm.config_obj.export = ["adapter"]
    with pytest.raises(ExportError, match="needs an adapter section"):
        export_all(llm, str(tmp_path), summary)


def flip(folder: Path, file: str, name: str) -> None:
    weights = load_file(folder / file)
    weights[name] = -weights[name]
    save_file(weights, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("broken", BOTH, ids=["adapter", "merged"])
def test_a_corrupted_export_is_caught(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    name = ExportOptions.from_config(broken).format
    llm = make_llm(export=BOTH)
    export_all(llm, str(tmp_path), summary)
    before = {path: path.read_bytes() for path in (tmp_path / "exported" / name).rglob("*") if path.is_file()}
    export_format = _formats[name]
    write = export_format.write

    def write_then_flip(llm: Any, folder: Path, options: ExportOptions) -> Written:
        written = write(llm, folder, options)
        if name == "merged":
            flip(folder, "model.safetensors", "model.layers.1.self_attn.o_proj.weight")
        else:
            key = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
            flip(folder, "adapter_model.safetensors", key)
        return written

    monkeypatch.setattr(export_format, "write", write_then_flip)
    with pytest.raises(ExportError, match=rf"(?s)format {name}: .*not the trained model.*{name}\.failed"):
        export_all(llm, str(tmp_path), summary)
    other = {"adapter": "merged", "merged": "adapter"}[name]
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == sorted([name, other, f"{name}.failed"])
    assert (tmp_path / "exported" / f"{name}.failed" / "config.json").exists() is (name == "merged")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_disk_full_keeps_the_old_export(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(export=["merged"])
    export_all(llm, str(tmp_path), summary)
    folder = tmp_path / "exported" / "merged"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(self: PreTrainedModel, save_directory: str, **_: Any) -> None:
        (Path(save_directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ExportError, match=r"disk is full.*unchanged"):
        export_all(llm, str(tmp_path), summary)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]


def test_one_failure_does_not_stop_the_others(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ExportError("merged went wrong")

    monkeypatch.setattr(merged, "merged_copy", fails)
    with pytest.raises(ExportError, match=r"^merged went wrong$"):
        export_all(make_llm(export=["merged", "adapter"]), str(tmp_path), summary)
    assert (tmp_path / "exported" / "adapter" / "README.md").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["gguf"], r"'gguf' is not one of adapter, adapterhub, merged"),
        (["merged", "merged"], "two entries"),
        ([{"format": "merged", "path": "../out"}], r"without '\.\.'"),
        ([{"format": "merged", "path": "/tmp/out"}], "absolute"),
        ([{"format": "merged", "dtype": "int8"}], r"export\.dtype"),
        ([{"format": "merged", "tolerance": -1.0}], "must not be negative"),
    ],
)
def test_what_cannot_work_is_said_before_training(make_llm: Any, entries: list[Any], message: str) -> None:
    config = make_llm(export=entries).config_obj
    with pytest.raises(ExportError, match=message):
        check_exports(config)


def test_adapters_that_cannot_be_merged(make_llm: Any) -> None:
    config = make_llm(export=["merged"]).config_obj
    config.adapter = SimpleNamespace(type="prefix_tuning", mergeable=False)
    with pytest.raises(ExportError, match="'prefix_tuning' cannot be merged"):
        check_exports(config)


def test_a_format_of_ones_own(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludwig_peft_plugin.export.formats._formats", dict(_formats))

    @register_format
    class Copy(merged.MergedFormat):
        name = "copy"

    with pytest.raises(ValueError, match="registered already"):
        register_format(Copy)
    assert issubclass(Copy, ExportFormat)
    (result,) = export_all(make_llm(export=["copy"]), str(tmp_path), summary)
    assert result.folder == str(tmp_path / "exported" / "copy")


def test_comparison_numbers() -> None:
    trained = [torch.tensor([[0.0, 2.0], [0.0, 2.0]])]
    exported = [torch.tensor([[0.0, 1.5], [0.0, 2.0]])]
    comparison = compare(trained, exported)
    assert comparison.max_abs_difference == 0.5
    assert comparison.relative_difference == pytest.approx(0.5)  # the logits 0, 2, 0, 2 have standard deviation 1
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1.5))
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert comparison.mean_kl == pytest.approx(expected)
    assert comparison.tokens == 2
    broken = compare(trained, [trained[0] * float("nan")])
    assert broken.relative_difference == math.inf
    assert broken.mean_kl == math.inf
