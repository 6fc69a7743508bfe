"""Tokenised rows with the text they come from, built a chunk at a time, and their form as Arrow record batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ludwig_peft_plugin.data.ragged import Ragged, offsets_of
from ludwig_peft_plugin.data.spool import Spool, TextSpool

SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.large_list(pa.int32()), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field("target", pa.large_string(), nullable=False),
        pa.field("task", pa.int32()),
    ]
)
"""Of rows with targets; `tokens` are prompt, target and eos, of which `prompt_length` are the prompt's; `task` is null
where there are no tasks."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of one set, in memory or over mapped files.

    Attributes:
        tokens: of each row.
        prompt_lengths: how many of each row are prompt, shape (n,), int32.
        prompts: the rendered prompts.
        targets: the answers; None for rows without targets.
        tasks: the number of each row's task, shape (n,), int32; None without tasks.
    """

    tokens: Ragged
    prompt_lengths: np.ndarray
    prompts: pa.LargeStringArray
    targets: pa.LargeStringArray | None
    tasks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to_batch(self) -> pa.RecordBatch:
        """Return rows with targets as a record batch of `SCHEMA`, over the same memory."""
        values = pa.Array.from_buffers(
            pa.int32(), len(self.tokens.values), [None, pa.py_buffer(self.tokens.values)], null_count=0
        )
        tokens = pa.Array.from_buffers(
            SCHEMA.field("tokens").type,
            len(self),
            [None, pa.py_buffer(np.ascontiguousarray(self.tokens.offsets))],
            null_count=0,
            children=[values],
        )
        lengths = pa.Array.from_buffers(pa.int32(), len(self), [None, pa.py_buffer(self.prompt_lengths)], null_count=0)
        tasks = pa.nulls(len(self), pa.int32()) if self.tasks is None else pa.array(self.tasks, pa.int32())
        return pa.record_batch([tokens, lengths, self.prompts, self.targets, tasks], schema=SCHEMA)

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> TokenRows:
        """Return the rows of a record batch of `SCHEMA`, over the same memory."""
        if not len(batch):  # Arrow leaves the offsets of an empty list out
            return TokenRowsWriter(targets=True).finish()
        tokens = batch.column("tokens")
        ragged = Ragged(tokens.values.to_numpy(), tokens.offsets.to_numpy())
        tasks = batch.column("task")
        return cls(
            ragged,
            batch.column("prompt_length").to_numpy(),
            batch.column("prompt"),
            batch.column("target"),
            None if tasks.null_count else tasks.to_numpy(),
        )


class TokenRowsWriter:
    """Takes rows a chunk at a time.

    Args:
        targets: whether the rows have targets.
        folder: for what does not stay in memory; None is the system's folder for temporary files.
    """

    def __init__(self, *, targets: bool, folder: str | None = None) -> None:
        self._tokens = Spool(np.int32, folder)
        self._lengths = Spool(np.int32, folder)
        self._prompt_lengths = Spool(np.int32, folder)
        self._prompts = TextSpool(folder)
        self._targets = TextSpool(folder) if targets else None
        self._tasks: list[np.ndarray] = []

    def add(
        self,
        tokens: Ragged,
        prompt_lengths: np.ndarray,
        prompts: list[str],
        targets: list[str] | None = None,
        tasks: np.ndarray | None = None,
    ) -> None:
        """Add rows: their tokens, how many of each are prompt, their texts and, where there are tasks, theirs.

        Raises:
            DataError: the folder has no room.
        """
        self._tokens.append(tokens.values)
        self._lengths.append(tokens.lengths)
        self._prompt_lengths.append(prompt_lengths)
        self._prompts.append(prompts)
        if self._targets is not None:
            assert targets is not None
            self._targets.append(targets)
        if tasks is not None:
            self._tasks.append(tasks)

    def finish(self) -> TokenRows:
        """Return all rows."""
        return TokenRows(
            Ragged(self._tokens.finish(), offsets_of(self._lengths.finish())),
            self._prompt_lengths.finish(),
            self._prompts.finish(),
            None if self._targets is None else self._targets.finish(),
            np.concatenate(self._tasks) if self._tasks else None,
        )
