"""What one method came to, and which methods no other beats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """One method of a comparison.

    Attributes:
        method: the adapter type, or `base`.
        key: of the job it belongs to.
        trained: parameters that were trained.
        total: all parameters, with the adapter's.
        validation_loss: of the kept model (the one with the lowest validation loss), in nats per target token.
        test_loss: of the kept model.
        final_validation_loss: at the last evaluation.
        final_test_loss: likewise.
        seconds: of training, evaluations included, over all parts of an interrupted run.
        peak_bytes: the most memory in use: of the GPU, or without one of the whole process.
        device: where it was trained.
        steps: optimiser steps.
        learning_rate: that it was trained with.
        error: why it failed, else None.
    """

    method: str
    key: str
    trained: int | None = None
    total: int | None = None
    validation_loss: float | None = None
    test_loss: float | None = None
    final_validation_loss: float | None = None
    final_test_loss: float | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None
    device: str = ""
    steps: int | None = None
    learning_rate: float | None = None
    error: str | None = None

    @property
    def loss(self) -> float | None:
        """What methods are compared by: the test loss, where there is no test set the validation loss."""
        return self.validation_loss if self.test_loss is None else self.test_loss


def write_result(folder: Path, result: Result) -> None:
    """Write a result to the folder of its method."""
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / FILE)


def read_result(folder: Path) -> Result | None:
    """Return the result in the folder of a method, None where there is none yet."""
    path = folder / FILE
    return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def finished_result(folder: Path, key: str) -> Result | None:
    """Return the result in the folder of a method if the method need not be trained again, else None.

    Args:
        folder: of the method.
        key: of the job: a result of other settings does not count, nor does that of a run that failed.
    """
    result = read_result(folder)
    return result if result is not None and result.key == key and result.error is None else None


def pareto_front(results: Sequence[Result]) -> list[str]:
    """Return the methods for which no other has a lower loss with as few parameters, from few to many."""
    measured: list[Any] = sorted(
        (result for result in results if result.loss is not None and result.trained is not None),
        key=lambda result: (result.trained, result.loss),
    )
    front: list[str] = []
    lowest = float("inf")
    for result in measured:
        if result.loss < lowest:
            lowest = result.loss
            front.append(result.method)
    return front


def failed(method: str, key: str, error: str, seconds: float = 0.0) -> Result:
    """Return the result of a method that could not be trained."""
    return replace(Result(method, key), error=error, seconds=seconds)
