"""Loading adapters that are damaged, do not fit or are not there: what is said; and those of the hub."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def trained(tiny: Any) -> Any:
    model = tiny.attach(LoraConfig(r=4, dropout=0.0))
    tiny.train(model)
    return model


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    save_adapter(trained(tiny), str(folder))
    return folder


def refusal(base: Any, folder: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(base, str(folder), trainable=True)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_a_missing_folder(tiny: Any, tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing", "./nothing", "nothing"):
        assert "does not exist" in refusal(tiny.base(), missing)


def test_a_missing_config(tiny: Any, saved: Path) -> None:
    (saved / CONFIG).unlink()
    assert CONFIG in refusal(tiny.base(), saved)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peft_type": "LORE"}', '{"peft_type": "LORA", "r": 0}'])
def test_a_damaged_config(tiny: Any, saved: Path, content: str) -> None:
    (saved / CONFIG).write_text(content)
    refusal(tiny.base(), saved)


def test_a_config_of_another_task(tiny: Any, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    assert "SEQ_CLS" in refusal(tiny.base(), saved)


def test_damaged_weights(tiny: Any, saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not safetensors"):
        (saved / WEIGHTS).write_bytes(damaged)
        assert "damaged" in refusal(tiny.base(), saved)


def test_missing_weights(tiny: Any, saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refusal(tiny.base(), saved)


def test_pickled_weights_are_not_read(tiny: Any, saved: Path) -> None:
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    text = refusal(tiny.base(), saved)
    assert "pickle" in text
    assert WEIGHTS in text


def test_an_adapter_of_a_base_of_other_shapes(tiny: Any, saved: Path) -> None:
    base = tiny.base(hidden_size=128)
    base.name_or_path = "org/larger"
    text = refusal(base, saved)
    assert "'llama'" in text
    assert "'org/larger'" in text
    assert "[4, 64]" in text
    assert "[4, 128]" in text


def test_an_adapter_of_a_deeper_base(tiny: Any, tmp_path: Path) -> None:
    model = tiny.attach(LoraConfig(), tiny.base(num_hidden_layers=4))
    save_adapter(model, str(tmp_path))
    assert "have no place here" in refusal(tiny.base(), tmp_path)


def test_an_adapter_of_a_shallower_base(tiny: Any, saved: Path) -> None:
    assert "4 of its tensors are missing" in refusal(tiny.base(num_hidden_layers=4), saved)


def test_an_adapter_of_another_architecture(tiny: Any, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    text = refusal(tiny.base(), saved)
    assert "c_attn" in text
    assert "q_proj" in text


def test_a_tensor_too_few_and_one_too_many(tiny: Any, saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, saved / WEIGHTS)
    assert "1 of its tensors are missing" in refusal(tiny.base(), saved)
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(2)}, saved / WEIGHTS)
    assert "1 of its tensors have no place here" in refusal(tiny.base(), saved)


def test_another_base_of_the_same_shape_is_a_warning(tiny: Any, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.base()
    base.name_or_path = "org/other"
    with caplog.at_level(logging.WARNING, logger="ludwig_peft_plugin"):
        load_adapter(base, str(saved), trainable=True)
    assert "made for the base 'llama' and is put on 'org/other'" in caplog.text
    caplog.clear()
    base = tiny.base()
    base.name_or_path = "org/llama"
    load_adapter(base, str(saved), trainable=True)
    assert not caplog.text


def test_an_unconverted_adapter_that_fits_no_base_others_have(tiny: Any, saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    for init, bits in (("corda", None), ("lora_ga", None), ("loftq", None), ("pissa", 4)):
        (saved / CONFIG).write_text(json.dumps({**config, "init_lora_weights": init}))
        assert "only fits the changed base" in refusal(tiny.base(bits=bits), saved)


class Hub:
    """A stand-in for the hub: repositories are folders."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories

    def download(self, repository: str, name: str) -> str:
        if repository not in self.repositories:
            raise LocalEntryNotFoundError("outgoing traffic has been disabled")
        path = self.repositories[repository] / name
        if not path.exists():
            raise EntryNotFoundError(f"{name} not found")
        return str(path)


def test_adapters_on_the_hub(tiny: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"me/adapter": saved})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    local = load_adapter(tiny.base(), str(saved), trainable=False)
    remote = load_adapter(tiny.base(), "me/adapter", trainable=False)
    assert torch.equal(tiny.logits(local), tiny.logits(remote))
    text = refusal(tiny.base(), "me/nothing")
    assert "cannot be loaded from the Hugging Face hub" in text
    assert "hf auth login" in text
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    assert "pickle" in refusal(tiny.base(), "me/adapter")


def test_a_gated_repository(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(repository: str, name: str) -> str:
        raise OSError("You are trying to access a gated repo.")

    assert issubclass(HfHubHTTPError, OSError)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    assert "gated repo" in refusal(tiny.base(), "me/gated")
