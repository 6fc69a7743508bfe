r"""Causal attention over many short sequences that lie one after another; queries and keys are rotated on the way in.

    o_i = \sum_{j <= i} p_ij v_j,   p_ij = exp(s r(q_i) . r(k_j) - l_i),   l_i = log \sum_{j <= i} exp(s r(q_i) r(k_j))

i and j are tokens of one sequence and r is RoPE (see elementwise.py). The backward pass follows Dao et al., 2022
(https://arxiv.org/abs/2205.14135): with \delta_i = do_i . o_i and ds_ij = p_ij (do_i . v_j - \delta_i),

    dr(q)_i = s \sum_j ds_ij r(k_j),   dr(k)_j = s \sum_i ds_ij r(q_i),   dv_j = \sum_i p_ij do_i

Kernels for long sequences cut each into tiles of 128 and more tokens, of which rows of a hundred leave much empty. Here
a tile is a few tokens with all query heads that share a key head, so rows of any length fill it, and keys are read once
for all of them. Which sequence a tile belongs to is found from the boundaries on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634

QUERY_ROWS = 64
"""Rows of a query tile, tokens times query heads of one key head, where queries own the program."""

KEYS_READ, KEYS_OWNED = 32, 64
"""Tokens of a key tile: where queries own the program and go through the keys, and the other way round."""

SEQUENCES = 128
"""Boundaries that are looked at together in search of a tile's sequence."""

VARYING = ["sequences"]
"""Arguments that change from batch to batch. Triton would compile a kernel again for numbers that 16 divides."""

WARPS, STAGES = 4, 3


def _read_by_keys(size: int) -> tuple[int, int]:
    """Return rows of a query tile, and how many tiles are under way, where keys own the program; by a head's size."""
    return (32, 3) if size > 64 else (64, 1)


@triton.jit
def _tile_of(boundaries, sequences, tile, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the sequence of a tile starts, its length, and the tile's first token in it (or one behind it).

    The tiles of sequence number s, which starts at token b, begin with tile b // TOKENS + s. So no tiles need counting:
    from there to the next sequence's first there are always as many as this one needs, and at most one that stays idle.
    """
    mine = -1
    for begin in range(0, sequences, SEQUENCES):
        numbers = begin + tl.arange(0, SEQUENCES)
        starts = tl.load(boundaries + numbers, mask=numbers < sequences, other=0)
        begun = (numbers < sequences) & (starts // TOKENS + numbers <= tile)
        mine += tl.sum(begun.to(tl.int32), axis=0)
    start = tl.load(boundaries + mine)
    length = tl.load(boundaries + mine + 1) - start
    return start, length, (tile - start // TOKENS - mine) * TOKENS


@triton.jit
def _halves(x, places, half, inside):  # type: ignore[no-untyped-def]
    first = tl.load(x + places[:, None] + half[None, :], mask=inside[:, None], other=0.0)
    second = tl.load(x + places[:, None] + half[None, :] + half.shape[0], mask=inside[:, None], other=0.0)
    return first, second


@triton.jit
def _turned(first, second, cos, sin, tokens, half, inside, ROTATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return both halves of heads rotated by the angles of their tokens, in their own dtype."""
    if ROTATE:
        c, s = _angles(cos, sin, tokens, half, inside)
        a, b = first.to(tl.float32), second.to(tl.float32)
        return (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)
    return first, second


@triton.jit
def _angles(cos, sin, tokens, half, inside):  # type: ignore[no-untyped-def]
    places = tokens[:, None] * (2 * half.shape[0]) + half[None, :]
    c = tl.load(cos + places, mask=inside[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + places, mask=inside[:, None], other=0.0).to(tl.float32)
    return c, s


@triton.jit
def _store_turned_back(  # type: ignore[no-untyped-def]
    result, places, first, second, cos, sin, tokens, half, inside, ROTATE: tl.constexpr
):
    if ROTATE:
        c, s = _angles(cos, sin, tokens, half, inside)
        first, second = first * c + second * s, second * c - first * s
    kind = result.dtype.element_ty
    tl.store(result + places[:, None] + half[None, :], first.to(kind), mask=inside[:, None])
    tl.store(result + places[:, None] + half[None, :] + half.shape[0], second.to(kind), mask=inside[:, None])


@triton.jit(do_not_specialize=VARYING)
def _attention(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, out, normalizer, boundaries, sequences, FACTOR: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 2 * HALF
    KV_HEADS: tl.constexpr = HEADS // SHARE
    kv_head = tl.program_id(1)
    start, length, first = _tile_of(boundaries, sequences, tl.program_id(0), TOKENS, SEQUENCES)
    if first < length:
        half, whole, keys = tl.arange(0, HALF), tl.arange(0, SIZE), tl.arange(0, KEYS)
        rows = tl.arange(0, TOKENS * SLOTS)
        tokens, slots = first + rows // SLOTS, rows % SLOTS
        real = (tokens < length) & (slots < SHARE)
        heads = (start + tokens).to(tl.int64) * HEADS + kv_head * SHARE + slots
        q1, q2 = _halves(q, heads * SIZE, half, real)
        q1, q2 = _turned(q1, q2, cos, sin, start + tokens, half, real, ROTATE)
        total = tl.zeros([TOKENS * SLOTS, SIZE], tl.float32)
        highest = tl.full([TOKENS * SLOTS], -1.0e30, tl.float32)
        weight = tl.zeros([TOKENS * SLOTS], tl.float32)
        for begin in range(0, tl.minimum(first + TOKENS, length), KEYS):
            others = begin + keys
            there = others < length
            places = ((start + others).to(tl.int64) * KV_HEADS + kv_head) * SIZE
            k1, k2 = _halves(k, places, half, there)
            k1, k2 = _turned(k1, k2, cos, sin, start + others, half, there, ROTATE)
            values = tl.load(v + places[:, None] + whole[None, :], mask=there[:, None], other=0.0)
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * FACTOR
            scores = tl.where(tokens[:, None] >= others[None, :], scores, -1.0e30)
            now = tl.maximum(highest, tl.max(scores, axis=1))
            shares = tl.exp2(scores - now[:, None])
            shrink = tl.exp2(highest - now)
            weight = weight * shrink + tl.sum(shares, axis=1)
            total = tl.dot(shares.to(values.dtype), values, total * shrink[:, None], input_precision="ieee")
            highest = now
        total = total / weight[:, None]
        place = heads[:, None] * SIZE + whole[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=real[:, None])
        tl.store(normalizer + heads, highest + tl.log2(weight), mask=real)


@triton.jit(do_not_specialize=VARYING)
def _attention_of_queries(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, out, normalizer, grad, delta, of_q, boundaries, sequences,
    FACTOR: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 2 * HALF
    KV_HEADS: tl.constexpr = HEADS // SHARE
    kv_head = tl.program_id(1)
    start, length, first = _tile_of(boundaries, sequences, tl.program_id(0), TOKENS, SEQUENCES)
    if first < length:
        half, whole, keys = tl.arange(0, HALF), tl.arange(0, SIZE), tl.arange(0, KEYS)
        rows = tl.arange(0, TOKENS * SLOTS)
        tokens, slots = first + rows // SLOTS, rows % SLOTS
        real = (tokens < length) & (slots < SHARE)
        heads = (start + tokens).to(tl.int64) * HEADS + kv_head * SHARE + slots
        place = heads[:, None] * SIZE + whole[None, :]
        grads = tl.load(grad + place, mask=real[:, None], other=0.0)
        outs = tl.load(out + place, mask=real[:, None], other=0.0)
        deltas = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
        tl.store(delta + heads, deltas, mask=real)
        normalizers = tl.load(normalizer + heads, mask=real, other=0.0)
        q1, q2 = _halves(q, heads * SIZE, half, real)
        q1, q2 = _turned(q1, q2, cos, sin, start + tokens, half, real, ROTATE)
        of_1 = tl.zeros([TOKENS * SLOTS, HALF], tl.float32)
        of_2 = tl.zeros([TOKENS * SLOTS, HALF], tl.float32)
        for begin in range(0, tl.minimum(first + TOKENS, length), KEYS):
            others = begin + keys
            there = others < length
            places = ((start + others).to(tl.int64) * KV_HEADS + kv_head) * SIZE
            k1, k2 = _halves(k, places, half, there)
            k1, k2 = _turned(k1, k2, cos, sin, start + others, half, there, ROTATE)
            values = tl.load(v + places[:, None] + whole[None, :], mask=there[:, None], other=0.0)
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * FACTOR
            shares = tl.exp2(scores - normalizers[:, None])
            shares = tl.where(tokens[:, None] >= others[None, :], shares, 0.0)
            of_shares = tl.dot(grads, tl.trans(values), input_precision="ieee")
            of_scores = (shares * (of_shares - deltas[:, None])).to(k1.dtype)
            of_1 = tl.dot(of_scores, k1, of_1, input_precision="ieee")
            of_2 = tl.dot(of_scores, k2, of_2, input_precision="ieee")
        at = start + tokens
        _store_turned_back(of_q, heads * SIZE, of_1 * SCALE, of_2 * SCALE, cos, sin, at, half, real, ROTATE)


@triton.jit(do_not_specialize=VARYING)
def _attention_of_keys_and_values(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, normalizer, grad, delta, of_k, of_v, boundaries, sequences,
    FACTOR: tl.constexpr, SCALE: tl.constexpr,
    HEADS: tl.constexpr, SHARE: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = 2 * HALF
    KV_HEADS: tl.constexpr = HEADS // SHARE
    kv_head = tl.program_id(1)
    start, length, first = _tile_of(boundaries, sequences, tl.program_id(0), KEYS, SEQUENCES)
    if first < length:
        half, whole = tl.arange(0, HALF), tl.arange(0, SIZE)
        rows = tl.arange(0, TOKENS * SLOTS)
        slots = rows % SLOTS
        keys = first + tl.arange(0, KEYS)
        there = keys < length
        places = ((start + keys).to(tl.int64) * KV_HEADS + kv_head) * SIZE
        k1, k2 = _halves(k, places, half, there)
        k1, k2 = _turned(k1, k2, cos, sin, start + keys, half, there, ROTATE)
        values = tl.load(v + places[:, None] + whole[None, :], mask=there[:, None], other=0.0)
        of_1 = tl.zeros([KEYS, HALF], tl.float32)
        of_2 = tl.zeros([KEYS, HALF], tl.float32)
        of_values = tl.zeros([KEYS, SIZE], tl.float32)
        for begin in range(first // TOKENS * TOKENS, length, TOKENS):
            tokens = begin + rows // SLOTS
            real = (tokens < length) & (slots < SHARE)
            heads = (start + tokens).to(tl.int64) * HEADS + kv_head * SHARE + slots
            q1, q2 = _halves(q, heads * SIZE, half, real)
            q1, q2 = _turned(q1, q2, cos, sin, start + tokens, half, real, ROTATE)
            grads = tl.load(grad + heads[:, None] * SIZE + whole[None, :], mask=real[:, None], other=0.0)
            normalizers = tl.load(normalizer + heads, mask=real, other=0.0)
            deltas = tl.load(delta + heads, mask=real, other=0.0)
            scores = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            scores = tl.dot(k2, tl.trans(q2), scores, input_precision="ieee") * FACTOR
            shares = tl.exp2(scores - normalizers[None, :])
            shares = tl.where((tokens[None, :] >= keys[:, None]) & real[None, :], shares, 0.0)
            of_values = tl.dot(shares.to(grads.dtype), grads, of_values, input_precision="ieee")
            of_shares = tl.dot(values, tl.trans(grads), input_precision="ieee")
            of_scores = (shares * (of_shares - deltas[None, :])).to(q1.dtype)
            of_1 = tl.dot(of_scores, q1, of_1, input_precision="ieee")
            of_2 = tl.dot(of_scores, q2, of_2, input_precision="ieee")
        at = start + keys
        _store_turned_back(of_k, places, of_1 * SCALE, of_2 * SCALE, cos, sin, at, half, there, ROTATE)
        tl.store(of_v + places[:, None] + whole[None, :], of_values.to(of_v.dtype.element_ty), mask=there[:, None])


class ShortAttention(torch.autograd.Function):
    """q (T, heads, d), k, v (T, kv_heads, d), cos, sin (T, d) or None -> output (T, heads, d).

    With angles, q and k are taken as they come out of their layers and rotated here, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        output = torch.empty_like(q)
        normalizer = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        sizes = _sizes(q, k, cu_seqlens, KEYS_READ, rotate=cos is not None)
        angles = (q, q) if cos is None else (cos, sin)
        tensors = (q, k, v, *angles, output, normalizer, cu_seqlens, len(cu_seqlens) - 1, scale * LOG2_E)
        _attention[_grid(q, k, cu_seqlens, sizes["TOKENS"])](*tensors, **sizes, num_warps=WARPS, num_stages=STAGES)
        ctx.save_for_backward(q, k, v, cos, sin, cu_seqlens, output, normalizer)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        q, k, v, cos, sin, cu_seqlens, output, normalizer = ctx.saved_tensors
        grad, scale = grads[0].contiguous(), ctx.scale
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = torch.empty_like(normalizer)
        sizes = _sizes(q, k, cu_seqlens, KEYS_READ, rotate=cos is not None)
        inputs = (q, k, v, *((q, q) if cos is None else (cos, sin)))
        rest = (cu_seqlens, len(cu_seqlens) - 1, scale * LOG2_E, scale)
        _attention_of_queries[_grid(q, k, cu_seqlens, sizes["TOKENS"])](
            *inputs,
            output,
            normalizer,
            grad,
            delta,
            of_q,
            *rest,
            **sizes,
            num_warps=WARPS,
            num_stages=STAGES,
        )
        rows, stages = _read_by_keys(q.shape[2])
        sizes = _sizes(q, k, cu_seqlens, KEYS_OWNED, rows, rotate=cos is not None)
        _attention_of_keys_and_values[_grid(q, k, cu_seqlens, KEYS_OWNED)](
            *inputs, normalizer, grad, delta, of_k, of_v, *rest, **sizes, num_warps=WARPS, num_stages=stages
        )
        return of_q, of_k, of_v, None, None, None, None


def _sizes(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, keys: int, rows: int = QUERY_ROWS, *, rotate: bool
) -> dict[str, Any]:
    share = q.shape[1] // k.shape[1]
    slots = triton.next_power_of_2(share)
    return {
        "HEADS": q.shape[1],
        "SHARE": share,
        "HALF": q.shape[2] // 2,
        "ROTATE": rotate,
        "TOKENS": max(1, rows // slots),
        "SLOTS": slots,
        "KEYS": keys,
        "SEQUENCES": SEQUENCES,
    }


def _grid(q: Tensor, k: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[int, int]:
    """Return as many tiles as the sequences can have at most, and the key heads."""
    return len(q) // tokens + len(cu_seqlens) - 1, k.shape[1]
