"""`ludwig-peft estimate`: its table, its JSON and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.estimate.gpu import gib, parse_size

CONFIG = {
    "model_type": "llm",
    "base_model": "tiny-llama-python",
    "input_features": [{"name": "prompt", "type": "text"}],
    "output_features": [{"name": "output", "type": "text"}],
    "preprocessing": {"global_max_sequence_length": 256},
    "adapter": {"type": "lora", "r": 16, "target_modules": "all-linear"},
    "trainer": {"type": "finetune", "batch_size": 8},
}


@pytest.fixture
def run(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs the command on a config and returns exit code, output and errors."""
    from ludwig_peft_plugin import cli

    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
        result = CliRunner().invoke(cli.app, ["estimate", "--config", str(path), *arguments])
        return result.exit_code, result.stdout, result.stderr

    return call


def values(run: Any, *arguments: str, **changes: Any) -> dict[str, Any]:
    code, output, errors = run("--json", *arguments, **changes)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def test_json_adds_up(run: Any) -> None:
    found = values(run)
    assert found["peak"] == sum(found["at_peak"].values())
    assert found["needed"] == found["peak"] + found["allocator_slack"] + found["cuda_context"]
    assert found["batch"]["tokens"] == 8 * 256
    assert found["parameters"]["trained"] == found["parameters"]["adapter"] > 0
    assert found["gpu"] is None
    assert found["fits"] is None


def test_what_fits_fits_and_one_more_does_not(run: Any) -> None:
    gpu = values(run, "--gpu", "2GiB")
    assert gpu["fits"]
    assert gpu["suggestions"] == []
    largest = gpu["largest_batch"]
    trainer = {"type": "finetune", "batch_size": largest}
    assert values(run, "--gpu", "2GiB", trainer=trainer)["fits"]
    over = values(run, "--gpu", "2GiB", trainer={**trainer, "batch_size": largest + 1})
    assert not over["fits"]
    assert over["largest_batch"] == largest
    assert over["suggestions"][0]["needed"] < over["needed"]


def test_the_table(run: Any) -> None:
    code, output, _ = run("--gpu", "720MiB")
    assert code == 0
    for text in (
        "activations",
        "optimiser state",
        "peak (max_memory_allocated)",
        "CUDA context",
        "of which 317,440 in the adapter",
    ):
        assert text in output
    assert "does not fit" in output
    assert "What would lower it, each by itself" in output
    assert "trainer.enable_gradient_checkpointing: true" in output
    assert "Largest batch that fits: trainer.batch_size:" in output


def test_several_changes_together(run: Any) -> None:
    trainer = {"type": "finetune", "batch_size": 512}
    single = values(run, "--gpu", "640MiB", trainer=trainer)["suggestions"]
    just_short = str(min(entry["needed"] for entry in single) // 2**20 - 1)
    found = values(run, "--gpu", f"{just_short}MiB", trainer=trainer)["together"]
    assert len(found["changes"]) > 1
    assert found["needed"] <= int(just_short) * 2**20
    _, output, _ = run("--gpu", f"{just_short}MiB", trainer=trainer)
    assert f"Fits with {'; '.join(found['changes'])}: {gib(found['needed'])} GiB." in " ".join(output.split())


def test_batch_size_auto_is_the_largest_that_fits(run: Any) -> None:
    found = values(run, "--gpu", "1GiB", trainer={"type": "finetune", "batch_size": "auto"})
    assert found["batch"]["size"] == found["largest_batch"] > 8
    assert values(run, trainer={"type": "finetune", "batch_size": "auto"})["batch"]["size"] == 1


def test_rows_and_targets_can_be_told(run: Any) -> None:
    whole, short = values(run), values(run, "--row-tokens", "64", "--target-share", "0.5")
    assert short["batch"]["tokens"] == 8 * 64
    assert short["batch"]["targets"] == 256
    assert short["peak"] < whole["peak"]


def test_a_base_described_by_its_config_alone(run: Any, tmp_path: Path) -> None:
    """The name is one that no network is asked for."""
    description = {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    for given in (tmp_path, tmp_path / "config.json"):
        found = values(run, "--model-config", str(given), base_model="nobody/has-this")
        assert found["base_model"].endswith("has-this")
        layer = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
        assert found["parameters"]["base"] == 2 * layer + 2 * 1000 * 512 + 512


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ((), {"adapter": {"type": "lorra"}}, "adapter.type"),
        ((), {"adapter": None, "trainer": {"type": "none"}}, "trainer.type: none"),
        ((), {"adapter": {"type": "lora", "target_modules": ["q_prj"]}}, "q_prj"),
        (("--gpu", "much"), {}, "--gpu: 'much'"),
        (("--model-config", "/nowhere"), {}, "--model-config"),
        ((), {"base_model": "./nowhere"}, "does not exist"),
    ],
)
def test_errors_are_a_few_lines(run: Any, arguments: Any, changes: dict[str, Any], message: str) -> None:
    code, output, errors = run(*arguments, **changes)
    assert code == 1
    assert output == ""
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("80 GB", 80 * 10**9), ("500MiB", 500 * 2**20), (".5gib", 2**29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 TiBs", "-3GiB", "0", "1e3"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ModelError, match="--gpu"):
        parse_size(text)


def test_gibibytes_are_shown_with_two_digits() -> None:
    assert [gib(2**30), gib(2**28), gib(-(2**30)), gib(123.456 * 2**30)] == ["1.00", "0.25", "-1.00", "123.5"]
