"""What Ray keeps of a trial of a search: the model whose validation was best, as of a trial that was not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

from ludwig.globals import TRAINING_CHECKPOINTS_DIR_PATH

BEST, LATEST = "best", "latest"
"""How Ludwig calls its checkpoints, before the ending."""


def load_best_first(folder: str) -> None:
    """Let a copy of a model's folder be loaded from its best checkpoint, where Ludwig would take the latest.

    Ludwig makes the copy after an evaluation, and before it saves the latest checkpoint: the copy holds the one of the
    evaluation before, or none, while the score that was reported for the trial is that of the best.

    Args:
        folder: what Ludwig has made for Ray; holds a folder `model`.
    """
    checkpoints = Path(folder, "model", TRAINING_CHECKPOINTS_DIR_PATH)
    for best in checkpoints.glob(f"{BEST}.*"):
        shutil.copyfile(best, best.with_name(f"{LATEST}{best.name.removeprefix(BEST)}"))
