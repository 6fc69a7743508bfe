"""Micro-batches of random tokens, as collating tokenized rows makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ludwig_peft_plugin.data.batches import MicroBatch


def micro_batch(
    lengths: Sequence[int],
    *,
    ids: tuple[int, int] = (3, 4000),
    seed: int = 0,
    prompt: int = 1,
    task_ids: torch.Tensor | None = None,
) -> MicroBatch:
    """Return sequences of random tokens that lie in one row without padding.

    Args:
        lengths: of the sequences, in tokens.
        ids: the lowest token number, and the first one that is too high.
        seed: of the tokens.
        prompt: how many of a sequence's first tokens carry no loss; at least one, which nothing predicts.
        task_ids: the task of each sequence (len(lengths),), for adapters that are trained on several.
    """
    ends = np.cumsum((0, *lengths))
    total = int(ends[-1])
    tokens = torch.randint(*ids, (total,), generator=torch.Generator().manual_seed(seed))
    positions = np.concatenate([np.arange(length) for length in lengths])
    predicted = np.flatnonzero(positions >= prompt)
    return MicroBatch(
        rows=np.arange(len(lengths)),
        input_ids=tokens,
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        max_length=max(lengths),
        targets=tokens[predicted],
        target_positions=torch.from_numpy(predicted - 1),
        target_rows=torch.from_numpy(np.searchsorted(ends, predicted, side="right") - 1),
        tokens=total,
        task_ids=task_ids,
    )
