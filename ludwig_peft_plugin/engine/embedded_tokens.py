"""Virtual tokens as inputs of the first layer, beside the embeddings of tokens (prompt tuning, p-tuning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.model_input import (
    ModelInput,
    VirtualTokens,
    flat_places,
    no_mask,
    padded_rows,
    positions,
)
from ludwig_peft_plugin.engine.transformers_attention import flat_row


class EmbeddedTokens(VirtualTokens):
    """Virtual tokens as embeddings: one prompt for all sequences, or one for each.

    Args:
        prompts: shape (1 or B, P, H).
    """

    def __init__(self, prompts: Tensor) -> None:
        self.count = prompts.shape[1]
        self._prompts = prompts

    def flat(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return the flat row of T + S P embeddings."""
        starts, places, prompt_places = flat_places(batch, self.count)
        embeddings = base.get_input_embeddings()(batch.input_ids)
        total = len(places) + len(prompt_places)
        row = embeddings.new_empty(total, embeddings.shape[-1])
        row = row.index_copy(0, prompt_places, self._of_sequences(starts, embeddings.dtype).flatten(0, 1))
        row = row.index_copy(0, places, embeddings)
        positions = torch.arange(self.count, device=places.device).repeat(len(starts) - 1)
        position_ids = batch.position_ids.new_empty(total).index_copy(0, prompt_places, positions)
        position_ids = position_ids.index_copy(0, places, batch.position_ids + self.count)
        arguments = flat_row(batch.input_ids, position_ids, starts, batch.max_length + self.count, no_mask(batch))
        arguments["input_ids"] = None
        return ModelInput({**arguments, "inputs_embeds": row[None]}, places, total)

    def padded(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return rows of P + L embeddings."""
        rows, places = padded_rows(batch)
        embeddings = base.get_input_embeddings()(rows)
        prompts = self._of_sequences(batch.cu_seqlens, embeddings.dtype)
        length = batch.max_length + self.count
        places = places + self.count * (places // batch.max_length + 1)
        arguments = {"inputs_embeds": torch.cat([prompts, embeddings], dim=1), "use_cache": False}
        return ModelInput(arguments, places, length)

    def after_padding(self, base: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return embeddings with the virtual tokens between padding and text, as if there were no padding."""
        embeddings = base.get_input_embeddings()(input_ids)
        rows, length = input_ids.shape
        prompts = self._prompts.to(embeddings.dtype).expand(rows, -1, -1)
        padding = mask.long().argmax(dim=1, keepdim=True)  # (B, 1); behind an answer's end there is some more
        places = torch.arange(length, device=mask.device).expand(rows, -1)
        places = places + self.count * (places >= padding)
        prompt_places = padding + torch.arange(self.count, device=mask.device)
        laid_out = embeddings.new_zeros(rows, length + self.count, embeddings.shape[-1])
        for where, what in ((places, embeddings), (prompt_places, prompts)):
            laid_out = laid_out.scatter(1, where[:, :, None].expand(-1, -1, what.shape[-1]), what)
        filled = mask.new_ones(rows, length + self.count).scatter(1, places, mask)
        return {"inputs_embeds": laid_out, "attention_mask": filled, "position_ids": positions(filled)}

    def for_generation(self, base: Any, input_ids: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """Return the arguments of `generate`: it reads the embeddings once, and the ids where it looks back."""
        arguments = self.after_padding(base, input_ids, mask)
        del arguments["position_ids"]  # made by `generate` from the mask, and continued
        return {**arguments, "input_ids": self._ids_and_mask(input_ids, mask)[0]}

    def of_rows(self, part: slice) -> VirtualTokens:
        """Return the virtual tokens of some of the rows."""
        return self if len(self._prompts) == 1 else EmbeddedTokens(self._prompts[part])

    def _of_sequences(self, starts: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a prompt for each sequence, (S, P, H); sequences of filler, which come last, take the first row's."""
        sequences = len(starts) - 1
        if len(self._prompts) == 1:
            return self._prompts.expand(sequences, -1, -1).to(dtype)
        filler = self._prompts[:1].expand(sequences - len(self._prompts), -1, -1)
        return torch.cat([self._prompts, filler]).to(dtype)
