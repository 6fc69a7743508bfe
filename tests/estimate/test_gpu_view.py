"""Within `gpu_view` meta tensors take a GPU's paths; nothing else does, and afterwards nothing does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ludwig_peft_plugin.estimate.autocast import autocast_view
from ludwig_peft_plugin.estimate.gpu_view import gpu_view
from ludwig_peft_plugin.estimate.tracker import MemoryTracker


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_attention_makes_no_scores() -> None:
    q, k, v = (meta(1, 4, 1024, 16).requires_grad_() for _ in range(3))
    scores = 4 * 1024 * 1024 * 2
    with gpu_view(), MemoryTracker([q, k, v]) as tracker:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert tracker.peak < scores / 4
    with MemoryTracker([q, k, v]) as tracker:
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert tracker.peak > scores


def test_fused_functions_have_the_shapes_and_gradients_of_the_plain_ones() -> None:
    x, weight = meta(2, 8, 64).requires_grad_(), meta(64).requires_grad_()
    q, shared = meta(2, 4, 8, 16).requires_grad_(), meta(2, 2, 8, 16).requires_grad_()
    with gpu_view():
        assert F.rms_norm(x, (64,), weight, 1e-5).shape == x.shape
        dropped = F.dropout(x, 0.1)
        assert dropped.shape == x.shape
        assert dropped.dtype == x.dtype
        assert F.dropout(x, 0.1, training=False) is x
        out = F.scaled_dot_product_attention(q, shared, shared, enable_gqa=True)
        (dropped.sum() + out.sum()).backward()
    assert out.shape == q.shape
    assert (x.grad is not None, q.grad is not None, shared.grad is not None) == (True, True, True)
    assert shared.grad.shape == shared.shape


def test_dropout_keeps_a_byte_for_each_number() -> None:
    x = meta(1024, 64).requires_grad_()
    with gpu_view(), MemoryTracker([x]) as tracker:
        dropped = F.dropout(x, 0.1)
    assert tracker.live == 1024 * 64 * (2 + 1)
    del dropped


def test_kernels_make_their_results_and_are_not_launched() -> None:
    pytest.importorskip("triton")
    from ludwig_peft_plugin.engine.elementwise import rms_norm, rms_norm_backward

    x, weight = meta(256, 64), meta(64)
    with gpu_view(), MemoryTracker([x, weight]) as tracker:
        y, scales = rms_norm(x, weight, 1e-5)
        assert tracker.peak == y.nbytes + scales.nbytes  # none of the arithmetic's intermediates
        assert rms_norm_backward(x, weight, 1e-5, y, x).shape == x.shape


def test_other_tensors_are_computed_as_ever() -> None:
    x = torch.randn(1, 2, 8, 4)
    expected = F.scaled_dot_product_attention(x, x, x)
    with gpu_view(autocast=torch.bfloat16):
        assert not x.is_cuda
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), expected)
        assert F.linear(x, torch.eye(4)).dtype == torch.float32


def test_everything_is_as_before_afterwards() -> None:
    from ludwig_peft_plugin.engine import attention, graphs
    from ludwig_peft_plugin.model import float8, float8_arithmetic

    owners = (F, torch.Tensor, torch, attention, graphs, float8, float8_arithmetic)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), gpu_view(autocast=torch.bfloat16):
        raise ZeroDivisionError
    assert [dict(vars(owner)) for owner in owners] == before


def test_autocast_multiplies_in_16_bits_and_casts_weights_once() -> None:
    layer = torch.nn.Linear(64, 64, bias=False, device="meta")
    x = meta(8, 64, dtype=torch.float32)
    with MemoryTracker([layer.weight, x]) as tracker, autocast_view(torch.bfloat16):
        y = layer(x)
        weight = 64 * 64 * 2
        assert y.dtype == torch.bfloat16
        assert tracker.live == weight + 2 * y.nbytes  # x in 16 bits is kept for the weight's gradient
        z = layer(y)
        assert tracker.live == weight + 3 * y.nbytes
        assert (x @ x.T).dtype == torch.bfloat16
        assert F.softmax(z, -1).dtype == torch.float32
        assert F.cross_entropy(z, torch.empty(8, dtype=torch.int64, device="meta")).dtype == torch.float32
