"""The commands and the server, on one small trained model; the YAMLs of configs/; the README's words."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ludwig_peft_plugin.cli import app

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, make_config, rows):
    folder = tmp_path_factory.mktemp("commands")
    rows.to_csv(folder / "rows.csv", index=False)
    config = make_config(dataset="rows.csv", trainer={"type": "finetune", "train_steps": 2, "batch_size": 4})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def model_folder(config_file):
    """A model trained by `ludwig train --config`, with no `--dataset`."""
    from ludwig.train import cli

    cli(["--config", str(config_file), "--output_directory", str(config_file.parent / "out"), "-l", "error"])
    (run,) = (config_file.parent / "out").iterdir()
    return run / "model"


def test_evaluate_command(model_folder, config_file, tmp_path):
    from ludwig.evaluate import cli

    data = str(config_file.parent / "rows.csv")
    cli(["-m", str(model_folder), "--dataset", data, "--split", "test", "-od", str(tmp_path), "-l", "error"])
    (statistics,) = tmp_path.rglob("test_statistics.json")
    metrics = json.loads(statistics.read_text())["output"]
    assert metrics["perplexity"] > 1
    assert 0 < metrics["token_accuracy"] < 1


def test_predict_command(model_folder, rows, tmp_path):
    from ludwig.predict import cli

    rows.head(3).drop(columns=["output"]).to_csv(tmp_path / "questions.csv", index=False)
    cli(["-m", str(model_folder), "--dataset", str(tmp_path / "questions.csv"), "-od", str(tmp_path), "-l", "error"])
    (answers,) = tmp_path.rglob("output_response.csv")
    assert answers.read_text().strip()


def test_experiment_command(config_file, tmp_path):
    from ludwig.experiment import cli

    cli(["--config", str(config_file), "--output_directory", str(tmp_path), "-l", "error"])
    assert list(tmp_path.rglob("test_statistics.json"))


def test_a_wrong_key_stops_the_command_with_a_suggestion(config_file, tmp_path):
    from ludwig.error import ConfigValidationError
    from ludwig.train import cli

    wrong = yaml.safe_load(config_file.read_text())
    wrong["adapter"]["rr"] = 3
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ConfigValidationError, match=r"adapter\.rr") as error:
        cli(["--config", str(tmp_path / "wrong.yaml"), "--output_directory", str(tmp_path), "-l", "error"])
    assert len(str(error.value).splitlines()) < 8


@pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette.testclient`")
def test_serve(model_folder, rows):
    from ludwig.api import LudwigModel
    from ludwig.serve import server
    from starlette.testclient import TestClient

    client = TestClient(server(LudwigModel.load(str(model_folder), logging_level=logging.ERROR)))
    assert client.get("/").status_code == 200
    row = {"prompt": "unused", "instruction": rows["instruction"][0], "input": rows["input"][0]}
    answer = client.post("/predict", data=row)
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["output_response"], str)


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_says_how_to_run_it_and_what_to_expect(path):
    text = path.read_text(encoding="utf-8")
    command = "hyperopt" if "\nhyperopt:" in text else "train"
    assert re.search(rf"^# Run: +ludwig {command} --config configs/{path.name}", text, re.MULTILINE)
    assert "# Memory:" in text
    assert "# Result:" in text


# Of the others, test_hyperopt.py runs the search, and tests/encoders the model with encoders.
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "\nexport:" in path.read_text(encoding="utf-8")], ids=lambda path: path.stem
)
def test_a_shipped_config_is_valid_and_its_quick_form_trains(path, new_model, rows, tmp_path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The quick form: the shipped base, a few rows, two steps.
    config |= {"base_model": "tiny-llama-python", "dataset": None, "backend": {"type": "local"}}
    config["trainer"] |= {"train_steps": 2}
    config["generation"] |= {"max_new_tokens": 4}
    results = new_model(config).train(dataset=rows, output_directory=str(tmp_path))
    exported = Path(results.output_directory) / "exported"
    assert {folder.name for folder in exported.iterdir()} == {entry["format"] for entry in config["export"]}


def test_the_readmes_config_is_valid(registered):
    from ludwig.schema.model_types.base import ModelConfig

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    config = yaml.safe_load(text) | {"base_model": "tiny-llama-python"}
    assert ModelConfig.from_dict(config).adapter.type == "qlora"


def test_the_readmes_python_runs(registered, config_file, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text(config_file.read_text())
    rows.to_csv("rows.csv", index=False)
    rows.head(2).drop(columns=["output"]).to_csv("my_questions.csv", index=False)
    scope: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]:
        exec(compile(code, "README.md", "exec"), scope)
    assert len(scope["predictions"]) == 2


def test_the_readmes_shell_commands_are_run_by_continuous_integration():
    commands = re.findall(r"^make \w+|`(make \w+)`", README, re.MULTILINE)
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"make demo", "make test"} <= {line for line in ci.splitlines() if line.startswith("make")}
    assert commands
    for file in re.findall(r"\]\(([\w/]+\.md|configs)\)", README):
        assert (ROOT / file).exists(), file


def test_check_command(config_file, tmp_path, registered):
    done = CliRunner().invoke(app, ["check", str(config_file)])
    assert done.exit_code == 0, done.output
    assert "tiny-llama-python" in done.output
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config_file.read_text().replace("adapter:", "adaptr:"))
    done = CliRunner().invoke(app, ["check", str(wrong)])
    assert done.exit_code == 1
    assert "adaptr" in done.output
    assert "Traceback" not in done.output


def test_schema_and_info_commands(tmp_path, registered):
    done = CliRunner().invoke(app, ["schema", str(tmp_path / "schema.json")])
    assert done.exit_code == 0, done.output
    assert "adapter" in json.loads((tmp_path / "schema.json").read_text())["properties"]
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0
    assert "ludwig" in done.output
