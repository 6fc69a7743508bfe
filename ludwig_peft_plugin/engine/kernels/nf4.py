"""Dequantise bitsandbytes' 4-bit weights: two numbers a byte, a scale for every 64 (or so) of them.

    w = code[i] * a,    a = scale of the block, itself code_2[j] * a_2 + offset where it was quantised too

as QLoRA describes it (Dettmers et al. 2023, arXiv:2305.14314). One pass; bitsandbytes dequantises the scales in another
and reaches half the memory speed of an H200. The result is the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 2048


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    packed, code, absmax, nested_code, nested_absmax, nested_offset, result, count,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = places < count
    bytes_ = tl.load(packed + places, mask=inside, other=0).to(tl.int32)
    block = (places * 2) // BLOCK_SIZE
    if NESTED:
        level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_code + level) * tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    first = tl.load(code + (bytes_ >> 4)) * scale
    second = tl.load(code + (bytes_ & 15)) * scale
    both = tl.interleave(first, second).to(result.dtype.element_ty)
    wide = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(result + wide, both, mask=wide < 2 * count)


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """Return the weight, in its shape and the dtype it had, of packed bytes and their bitsandbytes `QuantState`."""
    result = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    nested = state.nested
    inner = state.state2 if nested else state
    count = packed.numel()
    _dequantize[(triton.cdiv(count, BYTES),)](
        packed,
        state.code,
        state.absmax,
        inner.code,
        inner.absmax,
        state.offset if nested else state.absmax,
        result,
        count,
        state.blocksize,
        nested,
        inner.blocksize,
        BYTES,
        num_warps=8,
    )
    return result
