"""What Ray keeps of a trial is loaded from its best checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from ludwig_peft_plugin.training.search_checkpoint import load_best_first


def checkpoints(folder: Path, **contents: str) -> Path:
    path = folder / "model" / "training_checkpoints"
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / f"{name}.ckpt").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("latest", [{}, {"latest": "the evaluation before"}])
def test_the_best_is_loaded(tmp_path: Path, latest: dict[str, str]) -> None:
    from ludwig.utils.checkpoint_utils import get_latest_checkpoint_path

    path = checkpoints(tmp_path, best="best", **latest)
    (path / "best.safetensors").write_text("weights", encoding="utf-8")
    load_best_first(str(tmp_path))
    assert Path(get_latest_checkpoint_path(str(path))).read_text(encoding="utf-8") == "best"
    assert (path / "latest.safetensors").read_text(encoding="utf-8") == "weights"
    assert (path / "best.ckpt").read_text(encoding="utf-8") == "best"


def test_a_run_without_a_best_is_left_as_it_is(tmp_path: Path) -> None:
    path = checkpoints(tmp_path, latest="the only one")
    load_best_first(str(tmp_path))
    assert [file.read_text(encoding="utf-8") for file in path.iterdir()] == ["the only one"]
    load_best_first(str(tmp_path / "nothing"))
