"""The raw rows of a run: read, sampled, completed, and split as stock Ludwig splits them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from ludwig.constants import TEST, TRAINING, VALIDATION
from ludwig.data.utils import set_fixed_split

from ludwig_peft_plugin.data import retrieval
from ludwig_peft_plugin.data.cells import restore_integers
from ludwig_peft_plugin.data.missing import drop_without_target, fill_inputs
from ludwig_peft_plugin.data.prompts import prompt_of, require_column
from ludwig_peft_plugin.data.sources import DataSources, combine, load_frames
from ludwig_peft_plugin.data.splits import sample_rows, split_rows, split_section
from ludwig_peft_plugin.errors import DataError

logger = logging.getLogger(__name__)


class Rows:
    """The rows as one table, and what the config says about them.

    Attributes:
        frame: the table, with fewer rows and columns after each step.
        source: what the data are called in messages.
        target_column: the output feature's column.
        index_name: of the retrieval index, once prompts with retrieved examples have been rendered.

    Args:
        config: a Ludwig config as a dict.
        preprocessing: its preprocessing section, merged with Ludwig's defaults.
        sources: where the data are.
        seed: for sampling and splitting.
        frames: the sources' tables by option, where they have been read already.
        sample: whether `sample_ratio` and `sample_size` apply.

    Raises:
        DataError: a source cannot be read, or has not the columns the prompt needs.
    """

    def __init__(
        self,
        config: dict[str, Any],
        preprocessing: dict[str, Any],
        sources: DataSources,
        seed: int,
        *,
        frames: dict[str, pd.DataFrame] | None = None,
        sample: bool = True,
    ) -> None:
        self._config = config
        self._seed = seed
        self._input_feature = config["input_features"][0]
        self._output_feature = config["output_features"][0]
        self.target_column = str(self._output_feature["column"])
        self.index_name: str | None = None
        frames = load_frames(sources) if frames is None else frames
        self._columns = {_name(sources, option): list(frame.columns) for option, frame in frames.items()}
        self.source = next(iter(self._columns))
        if not retrieval.uses_retrieval(config):
            for source, columns in self._columns.items():
                prompt_of(config, self._input_feature, columns, source)
        self._preprocessing: Any = preprocessing
        if "dataset" not in frames:
            fixed: Any = set_fixed_split
            self._preprocessing = fixed(preprocessing)
        self.frame = combine(frames)
        if sample:
            self.frame = sample_rows(self.frame, preprocessing, seed)

    @property
    def has_targets(self) -> bool:
        """Whether the output column is there."""
        return self.target_column in self.frame.columns

    def require_targets(self) -> None:
        """Raise DataError where a source has no output column."""
        for source, columns in self._columns.items():
            require_column(self.target_column, columns, "output_features", source)

    def render_retrieved(self, index_name: str | None) -> None:
        """Render prompts that hold retrieved examples, which needs all rows at once."""
        if not retrieval.uses_retrieval(self._config):
            return
        split = self._preprocessing.get("split") or {}
        column = self.frame.get(split.get("column")) if split.get("type") == "fixed" else None
        self.frame, self.index_name = retrieval.add_prompts(
            self._config, self.frame, column, index_name, outputs=self.has_targets
        )

    def drop_unusable(
        self, prompt_columns: list[str], *, for_split: bool, for_targets: bool = True, kept: Iterable[str] = ()
    ) -> None:
        """Keep the columns that are used and the rows that can be, counting and logging the others.

        Args:
            prompt_columns: what the prompt is made of.
            kept: further columns that are kept, as they are.
            for_split: whether the rows are split afterwards; then exactly those go that go before a training split.
            for_targets: whether rows need a target.

        Raises:
            DataError: no row is left.
        """
        may_drop = for_split or for_targets
        split = self._split_columns() if for_split else []
        targets = [self.target_column] if may_drop and self.has_targets else []
        frame = self.frame[list(dict.fromkeys([*prompt_columns, *targets, *split, *kept]))]
        frame = frame.assign(**{name: restore_integers(frame[name]) for name in [*prompt_columns, *targets]})
        frame = fill_inputs(frame, prompt_columns, self._input_feature, may_drop=may_drop)
        if targets:
            frame = drop_without_target(frame, self.target_column, self._output_feature, self.source)
        lost = frame[split].isna().any(axis=1)
        if lost.any():
            logger.warning("%s rows are dropped: they have no %s.", f"{int(lost.sum()):,}", " and no ".join(split))
            frame = frame[~lost]
        if frame.empty:
            raise DataError(f"No row of {self.source} can be used: each misses a value that is needed.")
        self.frame = frame

    def split(self) -> dict[str, np.ndarray]:
        """Return which rows of `frame` are in the training, validation and test set, each (n,)."""
        section = split_section(self._preprocessing, self.frame.columns, self.source)
        rows = split_rows(self.frame, section, self._seed, self.source)
        places = {TRAINING: rows.training, VALIDATION: rows.validation, TEST: rows.test}
        logger.info("Rows: %s", ", ".join(f"{len(place):,} {name}" for name, place in places.items()))
        return places

    def _split_columns(self) -> list[str]:
        column = split_section(self._preprocessing, self.frame.columns, self.source).get("column")
        return [] if column is None else [column]


def _name(sources: DataSources, option: str) -> str:
    """Return what a source is called in messages: its option, and its path or URI if it has one."""
    value = getattr(sources, option)
    return f"{option} {value!r}" if isinstance(value, str) else option
