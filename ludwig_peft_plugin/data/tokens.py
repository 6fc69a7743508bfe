"""From text to tokens: the one rule for prompts and targets, whatever the tokenizer adds by itself.

    prompt = tokenizer(prompt text), with the special tokens the tokenizer puts in front, without the eos some append
    target = tokenizer(target text) without special tokens, then eos
    row    = prompt + target

Prompt and target are tokenised apart, as at prediction time the target is not there yet. The model learns eos as an
ordinary target token, so that it stops where an answer ends, also where eos is the padding token as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ludwig_peft_plugin.data.ragged import Ragged, join_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
CHARACTERS = 4 << 20  # tokenised at once: the tokenizer needs some hundred bytes a token until they are numbers


@dataclass(frozen=True)
class AutomaticTokens:
    """The special tokens a tokenizer puts around a text by itself."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> AutomaticTokens:
        """Find them by tokenising the same short text with and without."""
        bare = _tokenize(tokenizer, [_PROBE], special=False)[0].tolist()
        full = _tokenize(tokenizer, [_PROBE], special=True)[0].tolist()
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return cls(tuple(full[:start]), tuple(full[start + len(bare) :]))
        specials = set(tokenizer.all_special_ids)
        front = next((index for index, token in enumerate(full) if token not in specials), len(full))
        back = next((index for index, token in enumerate(reversed(full)) if token not in specials), 0)
        return cls(tuple(full[:front]), tuple(full[len(full) - back :]))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], automatic: AutomaticTokens | None = None
) -> Ragged:
    """Return the prompts' tokens, ready for a target to be appended or generated; one row a text.

    A text that starts with the bos text itself (chat templates do) gets no second bos. A prompt is never empty: where
    neither the text nor the tokenizer gives a token it is bos, or eos for tokenizers without bos.

    Args:
        tokenizer: with an eos token.
        texts: the prompts.
        automatic: what the tokenizer adds, where that is known already.
    """
    automatic = automatic or AutomaticTokens.of(tokenizer)
    rows = _tokenize(tokenizer, texts, special=True)
    starts, lengths = rows.offsets[:-1].copy(), rows.lengths
    if automatic.after == (tokenizer.eos_token_id,):
        lengths -= 1
    if automatic.before:
        doubled = _starts_with(rows, automatic.before * 2) & (lengths >= 2 * len(automatic.before))
        starts[doubled] += len(automatic.before)
        lengths[doubled] -= len(automatic.before)
    rows = rows.pieces(starts, lengths)
    empty = rows.lengths == 0
    if not empty.any():
        return rows
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return join_rows(rows, _one_where(empty, first))


def encode_targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Ragged:
    """Return the targets' tokens, each ending in one eos; one row a text."""
    eos = tokenizer.eos_token_id
    rows = _tokenize(tokenizer, texts, special=False)
    closed = np.zeros(len(rows), dtype=bool)
    filled = rows.lengths > 0
    closed[filled] = rows.values[rows.offsets[1:][filled] - 1] == eos
    return join_rows(rows, _one_where(~closed, eos))


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> Ragged:
    """Return the token ids of each text, neither padded nor cut."""
    encode = _encode_fast if _is_plain(tokenizer) else _encode
    parts = [Ragged.from_lists(encode(tokenizer, batch, special)) for batch in _batches(texts)]
    return parts[0] if len(parts) == 1 else Ragged.concatenate(parts)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode_fast(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Return the same as `_encode`, without the characters' positions and masks that nobody reads."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether calling the tokenizer does nothing but call its backend."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not hasattr(kind, "_switch_to_input_mode")
    )


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of about `CHARACTERS` characters at most, at least one text each."""
    batch: list[str] = []
    room = CHARACTERS
    for text in texts:
        if batch and len(text) > room:
            yield batch
            batch, room = [], CHARACTERS
        batch.append(text)
        room -= len(text)
    if batch:
        yield batch


def _starts_with(rows: Ragged, tokens: tuple[int, ...]) -> np.ndarray:
    """Return which rows start with `tokens`, shape (n,), bool."""
    result = rows.lengths >= len(tokens)
    for place, token in enumerate(tokens):
        result[result] = rows.values[rows.offsets[:-1][result] + place] == token
    return result


def _one_where(mask: np.ndarray, token: int) -> Ragged:
    """Return rows that hold `token` where `mask` is set and nothing elsewhere."""
    return Ragged(np.full(int(mask.sum()), token, dtype=np.int32), np.concatenate([[0], np.cumsum(mask)]))
