"""The recorder: what it keeps of a loop, and that it leaves nothing behind."""

import time

import pytest
import torch

from benchmarks.gpu.measure import Recorder


def loop(recorder: Recorder, steps: int, *, clip: bool) -> list[float]:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    norms = []
    recorder.begin()
    for step in range(steps):
        loss = (weight * (step + 1)).sum()
        loss.backward()
        norms.append(weight.grad.norm().item())
        if clip:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recorder.record(loss, torch.tensor(10 * (step + 1)))
        time.sleep(0.002)
        recorder.end_step()
    recorder.end()
    return norms


@pytest.mark.parametrize("clip", [True, False])
def test_values_of_a_loop(clip):
    original = torch.nn.utils.clip_grad_norm_
    recorder = Recorder(warm_up=2, steps=3, device="cpu")
    norms = loop(recorder, 5, clip=clip)
    result = recorder.result()
    assert recorder.finished
    assert torch.nn.utils.clip_grad_norm_ is original
    # The norm before clipping, and where nothing clips the norm of the gradients.
    assert result["gradient_norms"] == pytest.approx(norms)
    assert len(result["losses"]) == result["steps_done"] == 5
    assert result["tokens"] == 30 + 40 + 50
    assert result["tok_s"] == pytest.approx(120 / result["seconds"], rel=1e-3)
    assert result["ms_step"] >= 2
    assert result["graphs_in_timed_steps"] == 0
    assert "peak_gib" not in result


def test_gradients_are_not_watched_after_the_end():
    recorder = Recorder(warm_up=1, steps=1, device="cpu")
    loop(recorder, 2, clip=False)
    count = len(recorder.norms)
    loop(Recorder(warm_up=1, steps=1, device="cpu"), 2, clip=False)
    assert len(recorder.norms) == count


def test_a_run_that_stops_early_has_losses_and_no_speed():
    recorder = Recorder(warm_up=2, steps=10, device="cpu", stop=3)
    loop(recorder, 3, clip=True)
    assert recorder.finished
    result = recorder.result()
    assert len(result["losses"]) == 3
    assert "tok_s" not in result


def test_steps_without_counted_tokens_take_the_mean():
    recorder = Recorder(warm_up=1, steps=2, device="cpu")
    loop(recorder, 3, clip=True)
    recorder.tokens.clear()
    result = recorder.result(mean_step_tokens=7.5)
    assert result["tokens"] == 15
    assert not result["tokens_counted"]
    with pytest.raises(RuntimeError, match="not counted"):
        recorder.result()
