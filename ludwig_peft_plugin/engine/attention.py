"""Causal attention over sequences that lie one after another, each of which sees only itself.

    out_i = softmax(q_i K_s^T / sqrt(d)) V_s,   s: the tokens of i's own sequence up to i

On a GPU in 16 bits this is `torch.nn.attention.varlen`, flash attention over sequence boundaries (Dao et al., 2022,
https://arxiv.org/abs/2205.14135), and for short sequences a kernel of our own (kernels/short_attention.py). Elsewhere
the sequences are laid out as padded rows for this one operation: right padding is never seen by causal attention, so
all give the same result.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

SWITCH = "LUDWIG_PEFT_SHORT_ATTENTION"
"""Environment variable; 0 leaves short sequences to flash attention."""

LONGEST_SHORT = 512
"""Tokens of the longest sequence for which the kernel for short sequences is taken."""

MOST_SHORT = 2048
"""Sequences for which it is taken: each of its tiles looks through all of them for its own."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return the attention output, shape (T, heads, d).

    Args:
        query: shape (T, heads, d).
        key: shape (T, kv_heads, d); each serves heads / kv_heads query heads.
        value: shape (T, kv_heads, d).
        cu_seqlens: where sequences start and the last one ends, shape (S + 1,), int32.
        max_length: tokens of the longest sequence.
        scale: factor of the scores, usually 1 / sqrt(d).
        window: how many tokens, itself included, a token sees at most (sliding-window attention).
    """
    if len(query) == (len(cu_seqlens) - 1) * max_length:
        return _equal_lengths(query, key, value, max_length, scale, window)
    if takes_short_kernel(query, query.shape[-1], cu_seqlens, max_length, window):
        return rotated_attention(query, key, value, None, cu_seqlens, scale)
    if has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None or window >= max_length else window - 1
        boundaries = (cu_seqlens, cu_seqlens, max_length, max_length)
        output = varlen_attn(query, key, value, *boundaries, scale=scale, window_size=(left, 0))
        assert isinstance(output, Tensor)
        return output
    return _padded_attention(query, key, value, cu_seqlens, max_length, scale, window)


def takes_short_kernel(x: Tensor, size: int, cu_seqlens: Tensor, max_length: int, window: int | None) -> bool:
    """Return whether sequences are attended by `rotated_attention`.

    Args:
        x: any tensor (T, ...) of the device and dtype of the queries.
        size: of a head.
        cu_seqlens: as for `varlen_attention`.
        max_length: likewise.
        window: likewise.
    """
    sequences = len(cu_seqlens) - 1
    return (
        has_16_bit_kernels(x)
        and os.environ.get(SWITCH, "1") != "0"
        and size in (32, 64, 128)
        and max_length <= LONGEST_SHORT
        and sequences <= MOST_SHORT
        and len(x) != sequences * max_length
        and (window is None or window >= max_length)
        and not torch.compiler.is_compiling()  # Inductor cannot trace the kernel's backward pass for changing sizes
    )


def rotated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    """Return the attention output for short sequences on a GPU, with queries and keys rotated on the way in.

    Args:
        query: as for `varlen_attention`, before the rotation.
        key: likewise.
        value: likewise.
        angles: cosine and sine, each (T, d); None for queries and keys that are to be taken as they are.
        cu_seqlens: as for `varlen_attention`.
        scale: likewise.
    """
    from ludwig_peft_plugin.engine.kernels.short_attention import ShortAttention

    output: Tensor = ShortAttention.apply(query, key, value, *(angles or (None, None)), cu_seqlens, scale)
    return output


def _equal_lengths(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float, window: int | None) -> Tensor:
    """Attend where all sequences are equally long: they are a batch as they lie, for the fastest kernel there is."""
    mask = None if window is None or window >= length else _window_mask(length, window, query.device)
    key, value = own_heads(query, key, value)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.view(-1, length, *tensor.shape[1:]).transpose(1, 2)  # (S, heads, L, d)

    with sdpa_kernel(FASTEST_FIRST, set_priority=True):
        output = F.scaled_dot_product_attention(
            rows(query),
            rows(key),
            rows(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2).reshape(query.shape)


def has_varlen_kernel(query: Tensor) -> bool:
    """Return whether flash attention takes these queries: a GPU from Ampere on, 16 bits, heads of at most 256."""
    return has_16_bit_kernels(query) and query.shape[-1] <= 256


def has_16_bit_kernels(x: Tensor) -> bool:
    """Return whether `x` is in 16 bits on a GPU that has kernels for that: from Ampere on."""
    sixteen = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return sixteen and torch.cuda.get_device_capability(x.device)[0] >= 8


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scale: float, window: int | None
) -> Tensor:
    place = padded_places(cu_seqlens, max_length, len(query))
    shape = (len(cu_seqlens) - 1, max_length)

    def rows(tensor: Tensor) -> Tensor:
        laid_out = tensor.new_zeros((shape[0] * shape[1], *tensor.shape[1:])).index_copy(0, place, tensor)
        return laid_out.view(*shape, *tensor.shape[1:]).transpose(1, 2)  # (S, heads, L, d)

    key, value = own_heads(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    mask = None if window is None or window >= max_length else _window_mask(max_length, window, query.device)
    output = F.scaled_dot_product_attention(
        rows(query),
        rows(key),
        rows(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).reshape(shape[0] * shape[1], *query.shape[1:])[place]


def own_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values, shape (T, kv_heads, d), with a head for each of the queries' where it saves memory.

    On a GPU, only 16-bit attention has a kernel in which query heads share keys. In float32 PyTorch would turn to its
    plain formula, which keeps scores of L x L for every head; with heads of their own there is a kernel that does not.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or not needs_own_heads(query):
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def needs_own_heads(query: Tensor) -> bool:
    """Return whether these queries, shape (T, heads, d), have a fast kernel only with keys for each head."""
    return query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16)


def padded_places(cu_seqlens: Tensor, max_length: int, tokens: int) -> Tensor:
    """Return where each token lies when the sequences are rows of `max_length`, flattened; shape (T,), int64."""
    lengths = cu_seqlens.diff()
    owners = torch.arange(len(lengths), device=cu_seqlens.device).repeat_interleave(lengths, output_size=tokens)
    within = torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[:-1].long()[owners]
    return owners * max_length + within


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)
