"""Soft prompts: what saved folders hold, and what is refused when they are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import disturbed
from peft import PeftModel
from safetensors.torch import load_file, save_file
from soft_prompt_models import COUNT, NETWORKS, VARIANTS, logits, section, train

from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.soft_prompt_io import ENCODER
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.errors import AdapterError


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_folder_gives_the_same_logits(tiny: Any, variant: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    model = disturbed(tiny.attach(section(variant)), 0.3).eval()
    expected = logits(tiny, model)
    save_adapter(model, folder)
    held = load_file(f"{folder}/adapter_model.safetensors")
    assert any(name.startswith(ENCODER) for name in held) == (variant in NETWORKS)
    for trainable in (False, True):
        loaded = load_adapter(tiny.base(), folder, trainable=trainable)
        torch.testing.assert_close(logits(tiny, loaded), expected, rtol=1e-5, atol=1e-5)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) == trainable
    plain = PeftModel.from_pretrained(tiny.base(), folder)
    torch.testing.assert_close(logits(tiny, plain), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_goes_on_from_a_folder_as_if_it_had_not_stopped(tiny: Any, variant: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    model = disturbed(tiny.attach(section(variant)), 0.3).eval()
    save_adapter(model, folder)
    other = tiny.attach(section(variant, pretrained_adapter_weights=folder))
    for each in (model, other):
        train(tiny, each)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, other.get_parameter(name)), name
    save_adapter(other, folder)
    torch.testing.assert_close(
        logits(tiny, load_adapter(tiny.base(), folder, trainable=False)), logits(tiny, model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("variant", NETWORKS)
def test_folders_of_plain_peft(tiny: Any, variant: str, tmp_path: Path) -> None:
    """PEFT leaves the network out: such a folder predicts, and only a prefix is a thing to train by itself."""
    folder = str(tmp_path / "adapter")
    model = disturbed(tiny.attach(section(variant)), 0.3).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    assert list(load_file(f"{folder}/adapter_model.safetensors")) == ["prompt_embeddings"]
    loaded = load_adapter(tiny.base(), folder, trainable=False)
    torch.testing.assert_close(logits(tiny, loaded), logits(tiny, model), rtol=1e-5, atol=1e-5)
    if variant == "projected prefix":
        again = load_adapter(tiny.base(), folder, trainable=True)
        torch.testing.assert_close(logits(tiny, again), logits(tiny, model), rtol=1e-5, atol=1e-5)
        assert [name for name, p in again.named_parameters() if p.requires_grad] == [
            "prompt_encoder.default.embedding.weight"
        ]
    else:
        with pytest.raises(AdapterError, match="without the network"):
            load_adapter(tiny.base(), folder, trainable=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_adapter_replaces_the_one_before(tiny: Any, variant: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    model = disturbed(tiny.attach(section(variant)), 0.3).eval()
    expected = logits(tiny, model)
    save_adapter(model, folder)
    enable_checkpointing(model.train())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    again = load_adapter(model, folder, trainable=True)
    torch.testing.assert_close(logits(tiny, again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "shape", "foreign"])
@pytest.mark.parametrize("variant", ["prefix", "mlp", "multitask"])
def test_damaged_folders_are_refused(tiny: Any, variant: str, change: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    save_adapter(tiny.attach(section(variant)), folder)
    path = f"{folder}/adapter_model.safetensors"
    held = load_file(path)
    names = [name for name in held if name.startswith(ENCODER)] or list(held)
    name = names[0]
    if change == "missing":
        del held[name]
    elif change == "shape":
        held[name] = held[name][..., :-1].contiguous()
    else:
        held[name + "_too"] = torch.ones(1)
    save_file(held, path)
    with pytest.raises(AdapterError, match="does not fit"):
        load_adapter(tiny.base(), folder, trainable=True)


def test_a_folder_says_nothing_of_where_it_started(tiny: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "adapter")
    save_adapter(tiny.attach(section("prompt")), folder)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == COUNT
    assert config["tokenizer_name_or_path"] is None
