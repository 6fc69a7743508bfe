"""What a model reads: the tokens of a micro-batch with virtual tokens before each row, whichever kind those are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.attention import padded_places


@dataclass(frozen=True)
class ModelInput:
    """Arguments of a transformers model, and where its output has the batch's tokens.

    Attributes:
        arguments: by transformers' names.
        places: of each token in the flattened output, shape (T,).
        row_length: positions of the output's rows.
    """

    arguments: dict[str, Any]
    places: Tensor
    row_length: int


class VirtualTokens(ABC):
    """The P virtual tokens of one model, as they are now; they carry gradients.

    Attributes:
        count: P.
    """

    count: int

    @abstractmethod
    def flat(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return the input for a model that keeps sequences in one flat row apart."""

    @abstractmethod
    def padded(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return the input as rows padded on the right."""

    @abstractmethod
    def after_padding(self, base: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return a model's arguments for rows padded on the left.

        Args:
            base: the transformers model.
            input_ids: shape (B, L).
            mask: 0 for padding, on the left and behind the end of a row, shape (B, L).
        """

    @abstractmethod
    def for_generation(self, base: Any, input_ids: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`, whose `input_ids` are P longer than the rows.

        Args:
            base: the transformers model.
            input_ids: shape (B, L), padded on the left.
            mask: 0 for padding, shape (B, L).
            copies: how many rows the search keeps for each of the B.
        """

    def of_rows(self, part: slice) -> VirtualTokens:
        """Return the virtual tokens of some of the rows."""
        return self

    def _ids_and_mask(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids and mask with P places in front.

        The places hold each row's own first token, so that settings that look back at a text find no new token in it.
        """
        first = input_ids.gather(1, mask.long().argmax(dim=1, keepdim=True))
        ids = torch.cat([first.expand(-1, self.count), input_ids], dim=1)
        return ids, torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)


def flat_places(batch: MicroBatch, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a flat row's layout once `count` places are before each sequence.

    Returns:
        Where sequences start, (S + 1,), int32; where each token lies, (T,); where the new places lie, (S P,).
    """
    sequences, device = len(batch.cu_seqlens) - 1, batch.cu_seqlens.device
    starts = batch.cu_seqlens + count * torch.arange(sequences + 1, dtype=torch.int32, device=device)
    owners = torch.arange(sequences, device=device).repeat_interleave(
        batch.cu_seqlens.diff(), output_size=len(batch.input_ids)
    )
    places = torch.arange(len(batch.input_ids), device=device) + count * (owners + 1)
    return starts, places, (starts[:-1, None].long() + torch.arange(count, device=device)).flatten()


def padded_rows(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the sequences as rows padded on the right, (S, L), and where each token lies in them, (T,)."""
    shape = (len(batch.cu_seqlens) - 1, batch.max_length)
    places = padded_places(batch.cu_seqlens, batch.max_length, len(batch.input_ids))
    return batch.input_ids.new_zeros(shape[0] * shape[1]).index_copy(0, places, batch.input_ids).view(shape), places


def positions(mask: Tensor) -> Tensor:
    """Return the position of each token in its row, (B, L), from a mask that is 0 for padding, (B, L)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def no_mask(batch: MicroBatch) -> Tensor:
    """Return the mask of a flat row, which is not read, shape (1, 1, 1, 1)."""
    return batch.input_ids.new_ones((1, 1, 1, 1))
