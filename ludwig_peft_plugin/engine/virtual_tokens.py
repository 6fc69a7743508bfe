"""What a model reads: the tokens of a micro-batch, with the virtual tokens that a soft prompt puts before each row.

Soft prompts come in two kinds, and PEFT's prompt encoder gives either. Embeddings (prompt tuning, p-tuning) are inputs
of the first layer like those of tokens; keys and values (prefix tuning) are seen by every layer's attention. Both take
the first P positions of each sequence. PEFT writes them into padded rows in its own `forward`; here they are put before
every sequence of a flat row, where that is how a model runs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.attention import flat_row, padded_places
from ludwig_peft_plugin.engine.prefix_cache import KeysAndValues, flat_cache, growing_cache, padded_cache
from ludwig_peft_plugin.errors import ModelError

KEYS_AND_VALUES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""PEFT's prompt methods whose encoder gives keys and values; the others give embeddings."""


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
        starts, places, prompt_places = _flat_places(batch, self.count)
        embeddings = base.get_input_embeddings()(batch.input_ids)
        total = len(places) + len(prompt_places)
        row = embeddings.new_empty(total, embeddings.shape[-1])
        row = row.index_copy(0, prompt_places, self._of_sequences(starts, embeddings.dtype).flatten(0, 1))
        row = row.index_copy(0, places, embeddings)
        positions = torch.arange(self.count, device=places.device).repeat(len(starts) - 1)
        position_ids = batch.position_ids.new_empty(total).index_copy(0, prompt_places, positions)
        position_ids = position_ids.index_copy(0, places, batch.position_ids + self.count)
        arguments = flat_row(batch.input_ids, position_ids, starts, batch.max_length + self.count, _no_mask(batch))
        arguments["input_ids"] = None
        return ModelInput({**arguments, "inputs_embeds": row[None]}, places, total)

    def padded(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return rows of P + L embeddings."""
        rows, places = _padded_rows(batch)
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
        return {"inputs_embeds": laid_out, "attention_mask": filled, "position_ids": _positions(filled)}

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


class CachedTokens(VirtualTokens):
    """Virtual tokens as keys and values of every layer.

    Args:
        prefix: an entry for each layer.
    """

    def __init__(self, prefix: list[KeysAndValues]) -> None:
        self.count = prefix[0][0].shape[1]
        self._prefix = prefix

    def flat(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return the flat row of T tokens, whose layers find T + S P keys."""
        starts, places, prefix_places = _flat_places(batch, self.count)
        positions = batch.position_ids + self.count
        arguments = flat_row(batch.input_ids, positions, batch.cu_seqlens, batch.max_length, _no_mask(batch))
        arguments["cu_seq_lens_k"], arguments["max_length_k"] = starts, batch.max_length + self.count
        arguments["past_key_values"] = flat_cache(self._prefix, places, prefix_places)
        return ModelInput(arguments, torch.arange(len(places), device=places.device), len(places))

    def padded(self, base: Any, batch: MicroBatch) -> ModelInput:
        """Return rows of L tokens, whose layers find P + L keys."""
        rows, places = _padded_rows(batch)
        arguments = {"input_ids": rows, "past_key_values": padded_cache(self._prefix, len(rows)), "use_cache": False}
        return ModelInput(arguments, places, batch.max_length)

    def after_padding(self, base: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return the rows with a mask and positions that count the prefix."""
        filled = self._ids_and_mask(input_ids, mask)[1]
        return {
            "input_ids": input_ids,
            "attention_mask": filled,
            "position_ids": _positions(filled)[:, self.count :],
            "past_key_values": padded_cache(self._prefix, len(input_ids)),
        }

    def for_generation(self, base: Any, input_ids: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """Return the arguments of `generate`: it takes up where the prefix ends."""
        ids, filled = self._ids_and_mask(input_ids, mask)
        cache = growing_cache(self._prefix, copies * len(input_ids))
        return {"input_ids": ids, "attention_mask": filled, "past_key_values": cache}


def virtual_tokens(model: Any, task_ids: Tensor | None = None) -> VirtualTokens | None:
    """Return the virtual tokens of a PEFT model's active adapter, None where it has none or is switched off.

    Args:
        model: a transformers model, with or without PEFT around it.
        task_ids: which task each row belongs to, shape (B,), for adapters with a prompt for each task.

    Raises:
        ModelError: the adapter needs the tasks.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or getattr(model, "_adapters_disabled", False):
        return None
    if needs_tasks(model):
        if task_ids is None:
            raise ModelError(
                "The adapter has a prompt for each task, and the tasks of these rows are not known. Use a dataset with "
                "the column that adapter.task_column names."
            )
        prompts: Tensor = model.get_prompt(len(task_ids), task_ids)
        return EmbeddedTokens(prompts)
    prompt = model.get_prompt(1)
    if config.peft_type in KEYS_AND_VALUES:
        return CachedTokens([(layer.keys[0], layer.values[0]) for layer in prompt.layers])
    return EmbeddedTokens(prompt)


def needs_tasks(model: Any) -> bool:
    """Return whether the virtual tokens of a PEFT model differ between tasks."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return False
    return "task_ids" in inspect.signature(model.prompt_encoder[model.active_adapter].forward).parameters


@contextmanager
def readable_caches(base: Any, tokens: VirtualTokens | None) -> Iterator[None]:
    """Let checkpointed layers keep the cache they are given, which transformers takes away: these are only read.

    Some models leave the cache out in the loop over their layers, by a switch of their own, which is turned meanwhile.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = []
    loops: list[Any] = []
    if isinstance(tokens, CachedTokens) and getattr(base, "is_gradient_checkpointing", False):
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                layers.append(module)
            elif getattr(module, "gradient_checkpointing", False):
                loops.append(module)
    try:
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        for loop in loops:
            loop.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache
        for loop in loops:
            loop.gradient_checkpointing = True


def _flat_places(batch: MicroBatch, count: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _padded_rows(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the sequences as rows padded on the right, (S, L), and where each token lies in them, (T,)."""
    shape = (len(batch.cu_seqlens) - 1, batch.max_length)
    places = padded_places(batch.cu_seqlens, batch.max_length, len(batch.input_ids))
    return batch.input_ids.new_zeros(shape[0] * shape[1]).index_copy(0, places, batch.input_ids).view(shape), places


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _no_mask(batch: MicroBatch) -> Tensor:
    return batch.input_ids.new_ones((1, 1, 1, 1))
