"""The dataset the model trains on and predicts from: token rows, and the text they come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from ludwig.data.dataset.base import Dataset
from ludwig.utils.defaults import default_random_seed

from ludwig_peft_plugin.data.batcher import TokenBatcher
from ludwig_peft_plugin.data.ragged import Ragged


class TokenDataset(Dataset):
    """Tokenised prompts, with or without targets.

    Attributes:
        input_ids: prompt + target + eos of each row; only the prompt where there are no targets. Read-only where it
            is a mapped file, like `prompt_lengths`.
        prompt_lengths: how many tokens of each row are prompt, shape (n,), int32.
        frame: the text of each row; columns named after the input and, with targets, the output feature.
        has_targets: whether rows hold targets.
        pad_id: the token batches are filled up with; it is masked wherever it stands for padding.
        proc_columns: Ludwig's processed-column name of each column of `frame`.
        adapters: the adapter that answers each row, None for the active one; None where rows name none.
        tasks: the task of each row, shape (n,), int32; None where the adapter knows none.
    """

    # Attributes of Ludwig's own datasets: a file in Ludwig's format, which these have none of.
    data_cache_fp = None
    processed_data_fp = None

    def __init__(
        self,
        input_ids: Ragged,
        prompt_lengths: np.ndarray,
        frame: pd.DataFrame,
        *,
        has_targets: bool,
        pad_id: int = 0,
        proc_columns: dict[str, str] | None = None,
        tasks: np.ndarray | None = None,
    ) -> None:
        if not len(input_ids) == len(prompt_lengths) == len(frame):
            raise ValueError(f"{len(input_ids)} rows, {len(prompt_lengths)} prompt lengths and {len(frame)} texts")
        self.input_ids = input_ids
        self.prompt_lengths = prompt_lengths
        self.frame = frame
        self.has_targets = has_targets
        self.pad_id = pad_id
        self.proc_columns = proc_columns or {}
        self.adapters: list[str | None] | None = None
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self)

    @property
    def in_memory_size_bytes(self) -> int:
        """Bytes of the token arrays and of the text, in memory or in mapped files."""
        return self.input_ids.nbytes + self.prompt_lengths.nbytes + int(self.frame.memory_usage(deep=True).sum())

    def to_df(self, features: Iterable[Any] | None = None) -> pd.DataFrame:
        """Return the text of each row, in columns with the names Ludwig gives processed features."""
        frame = self.frame.rename(columns=self.proc_columns)
        return frame if features is None else frame[[feature.proc_column for feature in features]]

    def to_scalar_df(self, features: Iterable[Any] | None = None) -> pd.DataFrame:
        """Return the same as `to_df`: a text is one value."""
        return self.to_df(features)

    @contextlib.contextmanager
    def initialize_batcher(
        self,
        batch_size: int = 128,
        should_shuffle: bool = True,
        random_seed: int = default_random_seed,
        ignore_last: bool = False,
        distributed: Any = None,
        augmentation_pipeline: Any = None,
    ) -> Iterator[TokenBatcher]:
        """Yield a batcher at the start of the first epoch. The last, smaller batch is always part of it."""
        batcher = TokenBatcher(self, batch_size, shuffle=should_shuffle, seed=random_seed)
        batcher.set_epoch(0, batch_size)
        yield batcher
