"""What a training run is measured by: a recorder that is told of each step and does not wait for the device in between.

Losses and gradient norms are kept as tensors on the device and read at the end. The device is waited for after the
first step and at the two ends of the timed steps, nowhere else.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.gpu.power import PowerMeter

GIB = 2**30


class Recorder:
    """Records one training run.

    Args:
        warm_up: steps before the timed ones, at least 1.
        steps: timed steps.
        device: where the training runs.
        stop: steps after which `finished` is true; all of them by default.
    """

    def __init__(self, warm_up: int, steps: int, device: str, stop: int | None = None) -> None:
        self.warm_up, self.steps, self.stop = warm_up, steps, stop or warm_up + steps
        self.cuda = torch.device(device).type == "cuda"
        self.created = time.perf_counter()
        self.begun = self.first_step = math.nan
        self.window: list[float] = []  # host times at the two ends of the timed steps
        self.peaks: list[tuple[int, int]] = []  # bytes (allocated, reserved) up to each end of the timed steps
        self.graphs: list[int] = []  # graphs compiled up to each end of the timed steps
        self.host_times: list[float] = []
        self.events: list[Any] = []
        self.losses: list[Any] = []
        self.tokens: list[Any] = []
        self.norms: dict[int, Any] = {}  # by step, from 0
        self.meter = PowerMeter()
        self._clip = torch.nn.utils.clip_grad_norm_
        self._hook: Any = None

    @property
    def finished(self) -> bool:
        """Whether enough steps have been made."""
        return len(self.host_times) >= self.stop

    # ---- called while training --------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note that everything is set up, and watch the gradient norms from here on."""
        self.begun = time.perf_counter()

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> torch.Tensor:
            norm = self._clip(*args, **kwargs)
            self.norms[len(self.host_times)] = norm.detach()
            return norm

        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
        self._hook = register_optimizer_step_pre_hook(self._before_optimizer)
        if self.cuda:
            self.meter.start(f"GPU-{torch.cuda.get_device_properties(0).uuid}")

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take the norm from the gradients themselves, where no clipping by PyTorch has made it."""
        step = len(self.host_times)
        if step in self.norms:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.norms[step] = torch.nn.utils.get_total_norm(gradients) if gradients else 0.0

    def record(self, loss: Any, tokens: Any) -> None:
        """Keep the loss (nats a token) and the tokens, padding not counted, of the running step."""
        self.losses.append(loss.detach().clone() if isinstance(loss, torch.Tensor) else loss)
        self.tokens.append(tokens)

    def end_step(self) -> None:
        """Note the end of an optimiser step."""
        self.host_times.append(time.perf_counter())
        if self.cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        done = len(self.host_times)
        if done == 1:
            self._synchronize()
            self.first_step = time.perf_counter()
        if done in (self.warm_up, self.warm_up + self.steps):
            self._synchronize()
            self.window.append(time.perf_counter())
            self.graphs.append(compiled_graphs())
            if self.cuda:
                self.peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
                torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        """Stop watching."""
        torch.nn.utils.clip_grad_norm_ = self._clip
        self.meter.stop()
        if self._hook is not None:
            self._hook.remove()

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # ---- afterwards -------------------------------------------------------------------------------------------

    def result(self, mean_step_tokens: float | None = None) -> dict[str, Any]:
        """Return the measured values.

        Args:
            mean_step_tokens: tokens of an average step, for a tool whose steps' tokens could not be counted.
        """
        done = len(self.host_times)
        result: dict[str, Any] = {
            "steps_done": done,
            "setup_s": round(self.begun - self.created, 2),
            "first_step_s": round(self.first_step - self.created, 2),
            "compile_s": round(compile_seconds(), 2),
            "losses": [_number(loss) for loss in self.losses],
            "gradient_norms": [_number(self.norms.get(step, math.nan)) for step in range(done)],
        }
        if self.cuda:
            last = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            peaks = [*self.peaks, last]
            result["peak_gib"] = round(max(allocated for allocated, _ in peaks) / GIB, 3)
            result["peak_reserved_gib"] = round(max(reserved for _, reserved in peaks) / GIB, 3)
        if len(self.window) < 2:
            return result
        seconds = self.window[1] - self.window[0]
        timed = range(self.warm_up, self.warm_up + self.steps)
        counted = len(self.tokens) == done
        if counted:
            tokens = sum(_number(self.tokens[step]) for step in timed)
        elif mean_step_tokens is not None:
            tokens = mean_step_tokens * self.steps
        else:
            raise RuntimeError("the tokens of the steps were not counted")
        result |= {
            "seconds": seconds,
            "tokens": round(tokens),
            "tokens_counted": counted,
            "tok_s": round(tokens / seconds, 1),
            "ms_step": round(1000 * seconds / self.steps, 2),
            "graphs_in_timed_steps": self.graphs[1] - self.graphs[0],
        }
        if self.cuda:
            result["peak_timed_gib"] = round(self.peaks[1][0] / GIB, 3)
        result |= self.meter.between(*self.window)
        milliseconds = self._step_milliseconds(timed)
        result["median_ms_step"] = round(statistics.median(milliseconds), 2)
        result["step_ms"] = [round(step, 1) for step in milliseconds]
        return result

    def _step_milliseconds(self, timed: range) -> Sequence[float]:
        ends = range(timed.start - 1, timed.stop)
        if self.cuda:
            return [self.events[first].elapsed_time(self.events[second]) for first, second in pairwise(ends)]
        return [1000 * (self.host_times[second] - self.host_times[first]) for first, second in pairwise(ends)]


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_seconds() -> float:
    """Return the seconds torch.compile has taken in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def ceilings(device: str = "cuda") -> dict[str, float]:
    """Measure what the device can do: bfloat16 matrix products of random data, and a copy within its memory.

    Returns:
        matmul_flops: FLOP/s of an 8192 x 8192 x 8192 product, a few of them.
        sustained_matmul_flops: the same for seconds on end, which is as fast as the power limit lets it be.
        copy_bytes: bytes read and written a second.
    """
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2 * GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * size**3 / _median_seconds(lambda: left @ right),
        "sustained_matmul_flops": 2 * size**3 / _median_seconds(lambda: left @ right, warm_up=1500, repeats=500),
        "copy_bytes": 2 * source.numel() / _median_seconds(lambda: target.copy_(source)),
    }


def _median_seconds(work: Any, warm_up: int = 5, repeats: int = 20) -> float:
    times = []
    for repeat in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        if repeat >= warm_up:
            times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1000
