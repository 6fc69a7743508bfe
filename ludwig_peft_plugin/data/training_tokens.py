"""The tokens of a training run: those of an earlier run with the same data and settings, or new ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ludwig.constants import TRAINING
from ludwig.data.cache.types import CacheableDataset

from ludwig_peft_plugin.data.build import RowTokenizer
from ludwig_peft_plugin.data.lengths import LengthLimits, LengthReport
from ludwig_peft_plugin.data.progress import RowProgress
from ludwig_peft_plugin.data.rows import Rows
from ludwig_peft_plugin.data.token_cache import TokenCache, TokenSets
from ludwig_peft_plugin.data.token_rows import TokenRows
from ludwig_peft_plugin.data.yaml_paths import is_uri
from ludwig_peft_plugin.errors import DataError

logger = logging.getLogger(__name__)


class _OwnFolder(CacheableDataset):
    """Stands for a dataset where Ludwig's cache asks which folder to use, unless the backend names one."""

    def get_cache_path(self) -> str:
        return "tokens"

    def get_cache_directory(self) -> str:
        # Ludwig's own function for this makes the folder, also where nothing is to be written.
        return os.path.join(os.environ.get("LUDWIG_CACHE") or os.path.expanduser("~/.ludwig_cache"), "tokens")

    def unwrap(self) -> str:
        return self.get_cache_directory()


def token_cache(backend: Any, *, skip_save: bool) -> TokenCache:
    """Return the cache in the backend's `cache_dir`, or else in Ludwig's own cache (`LUDWIG_CACHE`).

    Args:
        backend: Ludwig's backend.
        skip_save: Ludwig's `skip_save_processed_input`: what is there is used, nothing is added.
    """
    folder = str(backend.cache.get_cache_directory(_OwnFolder()))
    if is_uri(folder):
        own = _OwnFolder().get_cache_directory()
        logger.warning(
            "Tokens are kept in %s: they are mapped into memory, which backend.cache_dir %s does not allow.",
            own,
            folder,
        )
        folder = own
    return TokenCache(folder, may_write=bool(backend.cache.can_cache(skip_save)))


def find_sets(cache: TokenCache, key: str | None) -> TokenSets | None:
    """Return the sets kept under `key`, if any, saying so, and again what was said about their rows."""
    found = None if key is None else cache.find(key)
    if found is None:
        return None
    sets, path = found
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in sets.rows.items())
    logger.info("Rows: %s. Their tokens are those of an earlier run with the same data and settings: %s", counts, path)
    for warning in sets.warnings:
        logger.warning("%s", warning)
    return sets


def tokenize_sets(rows: Rows, tokenizer: RowTokenizer, backend: Any, callbacks: list[Any]) -> TokenSets:
    """Return the rows of the three sets, tokenised.

    Raises:
        DataError: no training row is left, or rows are too long and the config says that is an error.
    """
    limits = tokenizer.settings.limits
    for callback in callbacks:
        callback.on_build_metadata_start(rows.frame, "training")
    template_tokens = tokenizer.template_tokens()
    limits.check_template(template_tokens)
    for callback in callbacks:
        callback.on_build_metadata_end(rows.frame, "training")
        callback.on_build_data_start(rows.frame, "training")
    split = rows.split()
    progress = RowProgress("Tokenizing", sum(map(len, split.values())), backend, callbacks)
    built: dict[str, TokenRows] = {}
    reports: list[LengthReport] = []
    for name, places in split.items():
        built[name], report = tokenizer.with_targets(rows.frame, places, rows.target_column, name, progress.advance)
        reports.append(report)
        if not len(built[name]) and len(places):
            say_empty(name, report, limits)
    progress.close()
    for callback in callbacks:
        callback.on_build_data_end(rows.frame, "training")
    return TokenSets(
        built,
        template_tokens,
        max(report.longest_prompt for report in reports),
        max(report.longest_target for report in reports),
    )


def say_empty(split: str, report: LengthReport, limits: LengthLimits, *, required: bool = False) -> None:
    """Raise DataError where no row of the training set fits, and warn for the other sets."""
    message = (
        f"No {split} row is left: all have more than {limits.row:,} tokens ({report.rows:,} rows, the longest has "
        f"{report.longest:,}; preprocessing.overlong: {limits.overlong}). Raise "
        "preprocessing.global_max_sequence_length or shorten the prompts."
    )
    if required or split == TRAINING:
        raise DataError(message)
    logger.warning("%s", message)


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Yield a list that grows by the warnings about data that are logged meanwhile."""
    warnings: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    recorder, source = Recorder(logging.WARNING), logging.getLogger("ludwig_peft_plugin.data")
    source.addHandler(recorder)
    try:
        yield warnings
    finally:
        source.removeHandler(recorder)
