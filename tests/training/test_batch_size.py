"""The search for a batch size: as large as memory and throughput allow, with a tenth of the memory left."""

import pytest
import torch

from ludwig_peft_plugin.training.batch_size import Measurement, largest_fast_size


class Device:
    """Memory grows by `each` a token from `base`; throughput rises with size up to `best` and then falls."""

    def __init__(self, memory: int, base: int = 1000, each: int = 10, best: int = 10**9) -> None:
        self.memory, self.base, self.each, self.best = memory, base, each, best
        self.tried: list[int] = []

    def measure(self, size: int) -> Measurement:
        self.tried.append(size)
        peak = self.base + 200 + self.each * size  # 200: what the first step allocates for good
        if peak > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        speed = size / (size + 500) if size <= self.best else 0.5 * self.best / size
        return Measurement(size, speed, peak)

    def search(self, smallest: int = 128, largest: int = 10**6, share: float = 0.9) -> Measurement:
        return largest_fast_size(self.measure, smallest, largest, 128, self.base, int(share * self.memory))


def test_fills_nine_tenths_of_the_memory():
    device = Device(memory=100_000)
    best = device.search()
    assert best.size % 128 == 0
    assert 0.8 * 100_000 < best.peak <= 0.9 * 100_000
    assert max(device.tried) == best.size  # memory is foreseen, so no size was too large
    assert len(device.tried) < 10


def test_stops_where_throughput_falls():
    device = Device(memory=10**9, best=2048)
    assert device.search().size == 2048
    assert max(device.tried) == 4096


def test_never_goes_beyond_the_largest():
    assert Device(memory=10**9).search(largest=3000).size <= 3000


def test_a_size_that_does_not_fit_ends_the_search():
    """Where the driver has less memory than it says."""
    device = Device(memory=50_000)
    best = largest_fast_size(device.measure, 128, 10**6, 128, device.base, 10**9)
    assert best.size == 4096
    assert device.tried[-1] == 8192


def test_not_even_the_smallest_fits():
    with pytest.raises(torch.OutOfMemoryError):
        Device(memory=1_500).search()


def test_the_smallest_is_taken_though_it_leaves_little():
    assert Device(memory=2_500).search().size == 128


def test_on_a_cpu_memory_is_no_bound():
    device = Device(memory=10**12)
    assert largest_fast_size(device.measure, 1, 100, 1, 0, None).size == 100
