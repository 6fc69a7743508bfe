"""Replacing a folder: all or nothing, whatever happens in between."""

import os
from pathlib import Path
from typing import Any

import pytest

from ludwig_peft_plugin.adapters.folders import recover, replaced_folder
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.errors import CheckpointError


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "weights"
    with replaced_folder(str(folder)) as new:
        Path(new, "a").write_text("old a")
        Path(new, "b").write_text("old b")
    return folder


def test_a_new_folder(target: Path) -> None:
    assert content(target) == {"a": "old a", "b": "old b"}
    assert os.listdir(target.parent) == [target.name]


def test_the_whole_folder_changes_at_once_and_other_files_stay(target: Path) -> None:
    (target / "sub").mkdir()
    (target / "sub" / "tokenizer").write_text("kept")
    with replaced_folder(str(target)) as new:
        Path(new, "a").write_text("new a")
        assert content(target)["a"] == "old a"
    assert content(target) == {"a": "new a", "b": "old b", "sub/tokenizer": "kept"}
    assert os.listdir(target.parent) == [target.name]


def test_an_error_leaves_the_old_one(target: Path) -> None:
    def interrupted() -> None:
        with replaced_folder(str(target)) as new:
            Path(new, "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(target) == {"a": "old a", "b": "old b"}
    assert os.listdir(target.parent) == [target.name]


def test_a_full_disk_is_said_and_leaves_the_old_one(target: Path) -> None:
    def full() -> None:
        with replaced_folder(str(target)) as new:
            Path(new, "a").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*before is untouched.*free some disk space"):
        full()
    assert content(target) == {"a": "old a", "b": "old b"}
    assert os.listdir(target.parent) == [target.name]


def test_a_failed_swap_brings_the_old_one_back(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(source: str, destination: str) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)

    def swap() -> None:
        with replaced_folder(str(target)) as new:
            Path(new, "a").write_text("new a")

    with pytest.raises(CheckpointError, match="Input/output error"):
        swap()
    assert content(target) == {"a": "old a", "b": "old b"}


def test_a_crash_between_the_renames_is_recovered(target: Path) -> None:
    target.rename(f"{target}.previous")
    recover(str(target))
    assert content(target) == {"a": "old a", "b": "old b"}
    recover(str(target))
    assert content(target) == {"a": "old a", "b": "old b"}


def test_what_a_killed_save_left_is_removed(target: Path) -> None:
    stale = target.parent / f".{target.name}.4711.tmp"
    stale.mkdir()
    (stale / "a").write_text("half")
    with replaced_folder(str(target)) as new:
        Path(new, "a").write_text("new a")
    assert os.listdir(target.parent) == [target.name]


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    def write() -> None:
        with replaced_folder(str(tmp_path / "file")) as new:
            Path(new, "a").write_text("a")

    with pytest.raises(CheckpointError):
        write()
    assert (tmp_path / "file").read_text() == "x"


def test_an_adapter_survives_a_crash_while_it_is_saved_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny.attach(LoraConfig(init_lora_weights="random")), str(tmp_path / "adapter")
    save_adapter(model, folder)
    expected = tiny.logits(model)
    tiny.train(model)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ludwig_peft_plugin.adapters.io.save_file", full)
    with pytest.raises(CheckpointError):
        save_adapter(model, folder)
    os.rename(folder, f"{folder}.previous")
    assert (tiny.logits(load_adapter(tiny.base(), folder, trainable=False)) == expected).all()
