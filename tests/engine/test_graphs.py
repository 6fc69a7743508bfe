"""Sizes of CUDA graphs: large enough for their batches, and never taken for equally long sequences by mistake."""

import numpy as np
import pytest
import torch

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.graphs import Size


def batch(lengths: list[int]) -> MicroBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    flat = torch.zeros(sum(lengths), dtype=torch.int64)
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return MicroBatch(np.arange(len(lengths)), flat, flat, boundaries, max(lengths), empty, empty, empty, sum(lengths))


@pytest.mark.parametrize("seed", range(5))
def test_sizes(seed):
    generator = np.random.default_rng(seed)
    for _ in range(300):
        count = int(generator.integers(1, 20))
        even = generator.random() < 0.3
        lengths = [int(generator.integers(1, 300))] * count if even else generator.integers(1, 300, count).tolist()
        size, tokens = Size.of(batch(lengths)), sum(lengths)
        assert size.is_even == (len(set(lengths)) == 1)
        assert size.holds(size)
        assert size.tokens >= tokens
        assert size.max_length >= max(lengths)
        if not size.is_even:
            assert size.sequences > count  # room for the filler
            assert size.max_length >= size.tokens - tokens
            assert size.tokens <= max(tokens * 1.07, tokens + 64)


def test_a_size_that_would_look_even_is_made_larger():
    uneven = Size(1024, 8, 127).joined(Size(1024, 7, 128))
    assert not uneven.is_even
    assert uneven.sequences >= 8


def test_joined_sizes_hold_both():
    one, other = Size(512, 8, 256), Size(512, 16, 128)
    joined = one.joined(other)
    assert joined.holds(one)
    assert joined.holds(other)
    assert not one.holds(other)
    assert not Size(512, 4, 128).holds(one)  # four sequences of 128: equally long ones only
