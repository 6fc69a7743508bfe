"""The tracker counts storages from their making to their end, and knows what kernels hold beside them."""

from __future__ import annotations

import pytest
import torch

from ludwig_peft_plugin.estimate.no_data import NoData
from ludwig_peft_plugin.estimate.tracker import ACTIVATIONS, BACKWARD, DEQUANTISED, GRADIENTS, KEPT, MemoryTracker

KIB = 1024


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_counts_each_storage_once_and_until_its_end() -> None:
    weight = meta(256)
    with MemoryTracker([weight]) as tracker:
        first = weight * 2
        view = first.view(16, 16)[3]
        assert tracker.live == KIB
        second = weight + weight
        assert tracker.live == 2 * KIB
        del first
        assert tracker.live == 2 * KIB  # the view holds it
        del view, second
        assert tracker.live == 0
        weight.mul_(2)
        assert tracker.live == 0
    assert tracker.peak == 2 * KIB
    assert tracker.at_peak == {ACTIVATIONS: 2 * KIB}


def test_what_a_step_leaves_alive_stays_counted() -> None:
    tracker = MemoryTracker()
    tracker.begin([], distinct=1)
    with tracker:
        cache = meta(256)
        passing = meta(512)
        del passing
    assert tracker.at_peak == {ACTIVATIONS: 3 * KIB}
    tracker.begin([], distinct=1)
    with tracker:
        y = cache * 2
        del y
    assert tracker.at_peak == {KEPT: KIB, ACTIVATIONS: KIB}
    del cache
    assert tracker.live == 0


def test_rounds_up_as_the_allocator_does() -> None:
    with MemoryTracker([]) as tracker:
        small = meta(1)
        assert tracker.live == 512
        del small


def test_tensors_with_data_are_not_on_the_gpu() -> None:
    with MemoryTracker([]) as tracker:
        torch.ones(1000)
    assert tracker.peak == 0


def test_parts_of_the_peak() -> None:
    weight = torch.nn.Parameter(meta(256, 256))
    x = meta(64, 256)
    with MemoryTracker([weight, x]) as tracker:
        weight.register_post_accumulate_grad_hook(tracker.is_gradient)
        y = (x @ weight).relu()
        tracker.phase = BACKWARD
        y.sum().backward()
        assert tracker._parts[GRADIENTS] == 256 * KIB
    assert sum(tracker.at_peak.values()) == tracker.peak
    assert tracker.peak >= 256 * KIB + 64 * KIB  # the weight's gradient and what it is made from


def test_a_dequantised_weight_is_a_part_of_its_own() -> None:
    weight = meta(128, 128, dtype=torch.int8)
    with MemoryTracker([weight]) as tracker:
        dense = weight.to(torch.bfloat16)
    assert tracker.at_peak == {DEQUANTISED: 32 * KIB}
    del dense


def test_workspace_of_a_four_bit_product() -> None:
    """bitsandbytes makes the whole weight (and its scales in float32) to multiply with more than a few rows."""
    import bitsandbytes as bnb

    from ludwig_peft_plugin.estimate.quantise import _four_bit

    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    _four_bit(layer, torch.bfloat16)
    x = meta(4, 256, dtype=torch.bfloat16)
    with MemoryTracker([x, layer.weight]) as tracker:
        layer(x)
    assert tracker.at_peak[DEQUANTISED] == 512 * 256 * 2 + 512 * 256 // 64 * 4
    assert "dynamic" in bnb.functional.name2qmap
    assert bnb.functional.name2qmap["dynamic"].device.type != "meta"


def test_eight_bit_products_run_without_data() -> None:
    import bitsandbytes as bnb

    from ludwig_peft_plugin.estimate.quantise import _eight_bit

    layer = bnb.nn.Linear8bitLt(256, 512, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    _eight_bit(layer, torch.bfloat16)
    x = meta(4, 256, dtype=torch.bfloat16).requires_grad_()
    with MemoryTracker([x, layer.weight, layer.weight.SCB]) as tracker:
        y = layer(x)
        y.sum().backward()
    assert y.shape == (4, 512)
    assert tracker.at_peak[DEQUANTISED] >= 512 * 256 * 2


def test_code_that_asks_for_numbers_goes_on() -> None:
    x = meta(4)
    with NoData():
        assert float(x.sum()) == 1.0
        assert bool((x > 0).any())
        assert x.cpu().device.type == "meta"
        assert x.long().max().item() == 1
    with pytest.raises(RuntimeError):
        x.sum().item()
