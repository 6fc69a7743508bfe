"""The progress of preprocessing, as Ludwig shows and reports it."""

from __future__ import annotations

import sys
from typing import Any

from ludwig.globals import is_progressbar_disabled
from ludwig.progress_bar import LudwigProgressBar


class RowProgress:
    """A progress bar over rows, and Ludwig's progress callbacks.

    There is no bar where Ludwig shows none: `set_disable_progressbar`, and processes that do not lead the others.
    """

    def __init__(self, title: str, total: int, backend: Any, callbacks: list[Any] | None) -> None:
        self._total, self._done, self._callbacks = total, 0, callbacks or []
        disabled: Any = is_progressbar_disabled
        settings = {"desc": title, "total": total, "unit": "rows", "file": sys.stdout, "disable": disabled()}
        self._bar = LudwigProgressBar(report_to_ray=False, config=settings, is_coordinator=backend.is_coordinator())

    def advance(self, rows: int) -> None:
        """Count `rows` more."""
        self._bar.update(rows)
        self._done += rows
        for callback in self._callbacks:
            callback.on_preprocess_progress(progress=self._done / self._total)

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()
