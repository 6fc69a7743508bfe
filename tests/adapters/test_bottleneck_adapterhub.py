"""AdapterHub's bottleneck adapters: recorded folders compute here what they do there, and are written as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.bottleneck import BottleneckConfig
from ludwig_peft_plugin.adapters.bottleneck.adapterhub import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, write_folder
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.io import load_adapter
from ludwig_peft_plugin.adapters.methods.bottleneck import BottleneckAdapterConfig
from ludwig_peft_plugin.errors import AdapterError

RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "adapterhub"
CLASSES = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModel, "distilbert": AutoModel}
CASES = sorted((folder.parent.parent.name, folder.parent.name) for folder in RECORDED.glob(f"*/*/{CONFIG_NAME}"))


def base(name: str) -> Any:
    return CLASSES[name].from_pretrained(RECORDED / name / "base").eval()


@torch.no_grad()
def output(model: Any, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the model computes for the tokens that are no padding."""
    mask = recorded["attention_mask"]
    result = model(input_ids=recorded["input_ids"], attention_mask=mask)
    return (result.logits if "logits" in result else result.last_hidden_state)[mask.bool()]


def test_every_recorded_folder_is_tested() -> None:
    assert len(CASES) == 27


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_folder_computes_the_same_and_is_written_the_same(name: str, case: str, tmp_path: Path) -> None:
    recorded = load_file(RECORDED / name / "expected.safetensors")
    real = recorded["attention_mask"].bool()
    model = load_adapter(base(name), str(RECORDED / name / case), trainable=False)
    assert torch.allclose(output(model, recorded), recorded[case][real], atol=1e-5, rtol=1e-5)
    assert (recorded[case] - recorded["base"])[real].abs().max() > 0.3

    write_folder(model, tmp_path, case)
    written, theirs = load_file(tmp_path / WEIGHTS_NAME), load_file(RECORDED / name / case / WEIGHTS_NAME)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[key], theirs[key]) for key in theirs)
    mine, original = (json.loads((folder / CONFIG_NAME).read_text()) for folder in (tmp_path, RECORDED / name / case))
    assert {**original["config"], **mine.pop("config")} == original.pop("config")
    assert {**original, "model_class": mine["model_class"], "model_name": "base"} == mine


def test_pretrained_weights_of_the_config(tmp_path: Path) -> None:
    folder = str(RECORDED / "llama" / "houlsby")
    recorded = load_file(RECORDED / "llama" / "expected.safetensors")
    section = BottleneckAdapterConfig(architecture="houlsby", pretrained_adapter_weights=folder)
    model = attach_adapter(base("llama"), section).eval()
    assert torch.allclose(output(model, recorded), recorded["houlsby"][recorded["attention_mask"].bool()], atol=1e-5)
    assert all(p.requires_grad == ("bottleneck_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("size", [1, 3, 5, 7, 31])
def test_a_size_survives_as_a_reduction_factor(size: int, tmp_path: Path) -> None:
    model = attach_adapter(base("llama"), BottleneckAdapterConfig(bottleneck_size=size))
    write_folder(model, tmp_path, "mine")
    again = load_adapter(base("llama"), str(tmp_path), trainable=False)
    loaded: BottleneckConfig = again.peft_config[ADAPTER_NAME]
    assert loaded.size(32, 0) == size


def changed(folder: Path, **options: Any) -> str:
    shutil.copytree(RECORDED / "llama" / "pfeiffer", folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["config"] |= options
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phm_layer": True}, "Compacter"),
        ({"inv_adapter": "nice"}, "invertible"),
        ({"use_gating": True}, "later tokens"),
        ({"architecture": "lora"}, "bottleneck ones"),
        ({"leave_out": [1]}, "has no place"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        load_adapter(base("llama"), changed(tmp_path / "hub", **options), trainable=False)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder = changed(tmp_path / "hub")
    (tmp_path / "hub" / WEIGHTS_NAME).rename(tmp_path / "hub" / PICKLE_NAME)
    with pytest.raises(AdapterError, match=r"pickle.*use_safetensors=True"):
        load_adapter(base("llama"), folder, trainable=False)


def test_old_names_of_activations(tmp_path: Path) -> None:
    folder = Path(changed(tmp_path / "hub", non_linearity="gelu"))
    config = json.loads((folder / CONFIG_NAME).read_text())
    del config["version"]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    model = load_adapter(base("llama"), str(folder), trainable=False)
    assert model.peft_config[ADAPTER_NAME].non_linearity == "gelu_new"
