"""What a worker needs to know beside its run: where model, rows and output lie, and on which device it works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.runs import Run

GENERATION_ROWS = "questions"
PREPARED = "PREPARED "  # begins the line that prepare.py prints


@dataclass(frozen=True)
class Job:
    """One run's files.

    Attributes:
        models: a folder of checkpoints, one for each shape.
        output: where the run writes what it must (and what nobody reads).
    """

    run: Run
    models: Path
    output: Path
    device: str

    @property
    def base_model(self) -> str:
        """A checkpoint's folder, or the name of a model that Ludwig knows."""
        folder = self.models / self.run.shape
        return str(folder) if folder.is_dir() else self.run.shape

    @property
    def rows(self) -> Path:
        """The CSV to train on."""
        return rows_file(self.models, self.run.row_length)

    @property
    def questions(self) -> Path:
        """The CSV of prompts to answer."""
        return self.models / f"{GENERATION_ROWS}.csv"


def rows_file(models: Path, row_length: int) -> Path:
    """Return where the rows of a kind lie; they are the same for all shapes."""
    return models / f"rows-{row_length}.csv"
