"""Attention in float32 on a GPU: no kernel shares keys among heads there, so keys are repeated, and no scores kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ludwig_peft_plugin.engine import attention
from ludwig_peft_plugin.estimate.gpu_view import gpu_view
from ludwig_peft_plugin.estimate.tracker import MemoryTracker

HEADS, SHARED, WIDTH = 4, 2, 16


def tensors(lengths: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, WIDTH) for heads in (HEADS, SHARED, SHARED)]
    made = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int().to(device)
    return (*made, ends)


def live_at_peak(lengths: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the most bytes that attention and its backward pass hold on a GPU, beside queries, keys and values."""
    *inputs, ends = tensors(lengths, "meta", dtype)
    with gpu_view(), MemoryTracker([*inputs, ends]) as tracker:
        attention.varlen_attention(*inputs, ends, max(lengths), 0.25).sum().backward()
    return tracker.peak


@pytest.mark.parametrize("lengths", [(7, 19, 4), (8, 8, 8)])
def test_heads_of_their_own_change_no_number(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for own in (False, True):
        monkeypatch.setattr(attention, "needs_own_heads", lambda query, own=own: own)
        *inputs, ends = tensors(lengths)
        output = attention.varlen_attention(*inputs, ends, max(lengths), 0.25)
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for shared, own in zip(*results, strict=True):
        torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-5)


def test_only_32_bits_off_the_cpu_need_them() -> None:
    *inputs, _ = tensors((5, 3))
    assert attention.own_heads(*inputs)[0] is inputs[1]
    with gpu_view():
        for dtype, heads in ((torch.float32, HEADS), (torch.bfloat16, SHARED)):
            *inputs, _ = tensors((5, 3), "meta", dtype)
            assert attention.own_heads(*inputs)[0].shape == (8, heads, WIDTH)


@pytest.mark.parametrize("lengths", [(1024, 512), (1024, 1024)])
def test_no_scores_are_live(lengths: tuple[int, ...]) -> None:
    """Scores of one layer would be more than all that is kept; without heads of their own they were."""
    scores = len(lengths) * HEADS * max(lengths) ** 2 * 4
    assert live_at_peak(lengths, torch.float32) < scores / 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "own_heads", lambda query, key, value: (key, value))
        assert live_at_peak(lengths, torch.float32) > scores


def test_full_fine_tuning_in_float32_grows_linearly(registered: None, make_config: Any) -> None:
    """Twice the tokens, twice the activations: nothing of L x L is kept."""
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    config_obj = make_config(adapter={"type": "full", "compute": "float32"}, length=256, precision="float32")
    estimator = Estimator(config_obj)
    saved = [estimator.estimate(BatchShape(2 * n, 2, n, n)).saved for n in (128, 256)]
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.05)
