"""Causal attention over sequences in one flat row whose keys begin before their queries.

    out_i = softmax(q_i K_s^T / sqrt(d)) V_s,   s: the P earlier keys of i's sequence and its tokens up to i

So attends a model with prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190): a sequence of L queries has
P + L keys, of which the last belongs to the last query. On a GPU in 16 bits this is `torch.nn.attention.varlen`, whose
causal limit counts from the ends; elsewhere the sequences are laid out as padded rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.engine.attention import has_varlen_kernel, padded_places


def prefixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    lengths: tuple[int, int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return the attention output, shape (T, heads, d).

    Args:
        query: shape (T, heads, d).
        key: shape (T + S P, kv_heads, d); each serves heads / kv_heads query heads.
        value: shape (T + S P, kv_heads, d).
        query_starts: where sequences start among the queries and the last one ends, shape (S + 1,), int32.
        key_starts: the same among the keys.
        lengths: queries and keys of the longest sequence; their difference is P for every sequence.
        scale: factor of the scores, usually 1 / sqrt(d).
        window: how many keys, its own included, a token sees at most (sliding-window attention).
    """
    if has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None or window >= lengths[1] else window - 1
        boundaries = (query_starts, key_starts, *lengths)
        output = varlen_attn(query, key, value, *boundaries, scale=scale, window_size=(left, 0))
        assert isinstance(output, Tensor)
        return output
    return _padded(query, key, value, query_starts, key_starts, lengths, scale, window)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    lengths: tuple[int, int],
    scale: float,
    window: int | None,
) -> Tensor:
    sequences = len(query_starts) - 1
    query_places = padded_places(query_starts, lengths[0], len(query))
    key_places = padded_places(key_starts, lengths[1], len(key))

    def rows(tensor: Tensor, places: Tensor, length: int) -> Tensor:
        laid_out = tensor.new_zeros((sequences * length, *tensor.shape[1:])).index_copy(0, places, tensor)
        return laid_out.view(sequences, length, *tensor.shape[1:]).transpose(1, 2)  # (S, heads, L, d)

    output = F.scaled_dot_product_attention(
        rows(query, query_places, lengths[0]),
        rows(key, key_places, lengths[1]),
        rows(value, key_places, lengths[1]),
        attn_mask=_mask(lengths, window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).reshape(sequences * lengths[0], *query.shape[1:])[query_places]


def _mask(lengths: tuple[int, int], window: int | None, device: torch.device) -> Tensor:
    """Return which keys a query sees, (L, P + L). Padding lies behind every real query's own key, so it is not seen."""
    queries, keys = lengths
    own = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance = own - torch.arange(keys, device=device)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
