"""Batches of token rows: one batch holds the micro-batches of one optimiser step.

A micro-batch has no padding: its rows lie one after another in one flat row, with positions that start again at each
of them and the offsets at which they start. Attention keeps within a row, so what a row learns depends neither on its
neighbours nor on how rows were grouped.

The model does not read the last token of a row with a target: it is only predicted. Nothing is predicted from it, and
no token before it sees it, so loss and gradients are those of the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset

IGNORED = -100  # the label transformers and PyTorch leave out of a loss


@dataclass(frozen=True)
class Room:
    """What the largest micro-batch of a run needs; one memory layout of this size serves them all.

    Attributes:
        tokens: that a micro-batch reads.
        sequences: of a micro-batch.
        max_length: tokens of the longest sequence.
        targets: tokens of a micro-batch that carry loss.
    """

    tokens: int
    sequences: int
    max_length: int
    targets: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together: T tokens are read, M are targets.

    Attributes:
        rows: indices of the dataset's rows, in the order of the sequences, shape (B,).
        input_ids: the sequences one after another, shape (T,), int64; with targets, each without its row's last token.
        position_ids: each token's place in its own sequence, shape (T,), int64.
        cu_seqlens: where each sequence starts and the last one ends, shape (S + 1,), int32. S is B, or more where
            sequences of filler tokens, which have no targets, bring T up to a fixed length.
        max_length: tokens of the longest sequence.
        targets: the tokens that carry loss, shape (M,), int64. The first token of a row is never predicted.
        target_positions: the place in the flat row whose output predicts each target, shape (M,), int64.
        target_rows: which of the B sequences each target belongs to, shape (M,), int64, ascending.
        tokens: tokens of the dataset's rows, their last ones included, filler left out.
        room: what the run's largest micro-batch needs, where that is known.
        task_ids: which task each row belongs to, shape (B,), int64; None where the data name none.
    """

    rows: np.ndarray
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    targets: Tensor
    target_positions: Tensor
    target_rows: Tensor
    tokens: int
    room: Room | None = None
    task_ids: Tensor | None = None

    @property
    def target_tokens(self) -> int:
        """How many tokens carry loss."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same batch on `device`; from pinned memory the copy does not wait."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Return the same batch in page-locked memory, from which a GPU copies while the host goes on."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: object) -> MicroBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        assert callable(change)
        return replace(self, **{name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)})


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimiser step, with the counts that weight them."""

    micro_batches: list[MicroBatch]
    target_tokens: int
    tokens: int

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> StepBatch:
        """Return a step made of the given micro-batches."""
        parts = list(micro_batches)
        return cls(parts, sum(part.target_tokens for part in parts), sum(part.tokens for part in parts))


def collate(
    dataset: TokenDataset, rows: np.ndarray, *, length: int | None = None, room: Room | None = None
) -> MicroBatch:
    """Return the given rows of `dataset` as one micro-batch.

    Args:
        dataset: where the rows come from.
        rows: indices of the rows, shape (B,).
        length: bring the flat row up to this many tokens, with sequences of filler tokens no longer than the longest
            row; None adds nothing.
        room: what the run's largest micro-batch needs.

    Raises:
        ValueError: more than `length` tokens of the rows are read.
    """
    sequences = [dataset.input_ids[int(row)] for row in rows]
    lengths = read_lengths(dataset, rows)
    read = [sequence[:length] for sequence, length in zip(sequences, lengths.tolist(), strict=True)]
    tokens, longest = int(lengths.sum()), int(lengths.max(initial=1))
    if length is not None:
        if tokens > length:
            raise ValueError(f"{tokens} tokens do not fit into {length}")
        lengths = np.concatenate([lengths, _filler(length - tokens, longest)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    input_ids = np.zeros(total, dtype=np.int64)
    input_ids[:tokens] = np.concatenate(read)
    position_ids = np.arange(total) - np.repeat(offsets[:-1], lengths)
    targets, places, owners = _targets(dataset, rows, sequences, offsets)
    return MicroBatch(
        rows=rows,
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        max_length=longest,
        targets=torch.from_numpy(targets),
        target_positions=torch.from_numpy(places),
        target_rows=torch.from_numpy(owners),
        tokens=sum(len(sequence) for sequence in sequences),
        room=room,
        task_ids=_task_ids(dataset, rows),
    )


def read_lengths(dataset: TokenDataset, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return how many tokens of each of the given rows, by default of all, the model reads, shape (B,), int64."""
    lengths = dataset.input_ids.lengths[rows]
    return np.maximum(lengths - 1, np.minimum(lengths, 1)) if dataset.has_targets else lengths


def _task_ids(dataset: TokenDataset, rows: np.ndarray) -> Tensor | None:
    tasks = getattr(dataset, "tasks", None)
    return None if tasks is None else torch.from_numpy(np.asarray(tasks)[rows].astype(np.int64))


def _filler(missing: int, longest: int) -> np.ndarray:
    """Return the lengths of filler sequences that make up `missing` tokens, none longer than `longest`."""
    whole, rest = divmod(missing, longest)
    return np.array([longest] * whole + ([rest] if rest else []), dtype=np.int64)


def _targets(
    dataset: TokenDataset, rows: np.ndarray, sequences: list[np.ndarray], offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the target tokens, the places that predict them and the sequences they belong to, each (M,), int64."""
    if not dataset.has_targets:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = _first_targets(dataset, rows)
    parts = [sequence[start:] for sequence, start in zip(sequences, starts, strict=True)]
    counts = np.array([len(part) for part in parts], dtype=np.int64)
    targets = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
    owners = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return targets, offsets[: len(rows)][owners] + starts[owners] + within - 1, owners


def target_counts(dataset: TokenDataset, rows: np.ndarray) -> np.ndarray:
    """Return how many tokens of each of the given rows carry loss, shape (B,), int64."""
    if not dataset.has_targets:
        return np.zeros(len(rows), np.int64)
    return np.maximum(dataset.input_ids.lengths[rows] - _first_targets(dataset, rows), 0).astype(np.int64)


def _first_targets(dataset: TokenDataset, rows: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(dataset.prompt_lengths)[rows].astype(np.int64), 1)


def token_batches(dataset: TokenDataset, rows: np.ndarray, tokens: int) -> Iterator[MicroBatch]:
    """Yield `rows`, in the given order, in micro-batches that read at most `tokens` tokens (at least one row each)."""
    lengths = read_lengths(dataset, rows)
    start = 0
    while start < len(rows):
        ends = np.cumsum(lengths[start : start + tokens])
        count = max(1, int(np.searchsorted(ends, tokens, side="right")))
        yield collate(dataset, rows[start : start + count])
        start += count


def padded(dataset: TokenDataset, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
    """Return rows padded on the right, as transformers' own labels loss takes them: for PEFT's data-driven starts.

    Returns:
        input_ids, attention_mask and labels (-100 where there is no target), each (B, L), int64.
    """
    sequences = [dataset.input_ids[int(row)] for row in rows]
    shape = (len(rows), max(len(sequence) for sequence in sequences))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        start, end = int(dataset.prompt_lengths[row]), len(sequence)
        input_ids[index, :end] = sequence
        mask[index, :end] = 1
        if dataset.has_targets:
            labels[index, start:end] = sequence[start:end]
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
