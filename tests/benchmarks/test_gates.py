"""Which measured numbers count."""

import math

import pytest

from benchmarks.gpu.gates import CURVE_TOLERANCE, curve_difference, failures, falls

FALLING = [12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0]


def test_a_good_run_of_a_peer_counts(record):
    run = record("8b/unsloth-lora-pack")
    assert failures(run, {run["key"]: run}) == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"gradient_norms": [1.0, 0.0]}, "gradient norm"),
        ({"gradient_norms": [1.0, math.nan]}, "gradient norm"),
        ({"gradient_norms": []}, "gradient norm"),
        ({"losses": [*FALLING[:-1], math.inf]}, "not finite"),
        ({"losses": FALLING[::-1]}, "does not fall"),
        ({"status": "stopped after 150 s"}, "stopped after 150 s"),
    ],
)
def test_a_bad_run_does_not_count(record, values, reason):
    (found,) = failures(record("8b/trl-lora-pack", **values), {})
    assert reason in found


def test_ours_is_compared_with_the_plain_path(record):
    ours = record("8b/ours-lora-pack")
    plain = record("8b/plain-lora-pack", losses=FALLING[:3])
    assert failures(ours, {ours["key"]: ours, plain["key"]: plain}) == []
    off = record("8b/plain-lora-pack", losses=[loss * (1 + 2 * CURVE_TOLERANCE) for loss in FALLING[:3]])
    (reason,) = failures(ours, {off["key"]: off})
    assert "plain-lora-pack" in reason
    (reason,) = failures(ours, {})
    assert "no result" in reason
    (reason,) = failures(ours, {plain["key"]: {**plain, "status": "failed with exit code 1"}})
    assert "no result" in reason


def test_the_first_steps_of_a_plain_run_need_not_fall(record):
    assert failures(record("8b/plain-lora-pack", losses=[10.0, 10.1, 10.2, 10.3]), {}) == []


def test_answers_need_tokens_and_a_finite_loss(record):
    assert failures(record("1b/stock-generate"), {}) == []
    assert failures(record("1b/stock-generate", tokens=0), {})
    assert failures(record("1b/stock-generate", loss=math.nan), {})


def test_falling_is_told_from_the_quarters():
    assert falls([5.0, 9.0, 9.0, 4.9])
    assert not falls([5.0, 1.0, 1.0, 5.0])
    assert not falls([3.0])


def test_the_difference_of_short_curves_is_that_of_the_worst_step():
    assert curve_difference([10.0, 9.9, 5.0], [10.0, 10.0]) == pytest.approx(0.01)
    assert curve_difference([], [1.0]) == math.inf
    assert curve_difference([math.nan], [1.0]) == math.inf


def test_the_difference_of_long_curves_is_that_of_means():
    steps = 300
    reference = [10.0] * steps
    noisy = [10.0 + (1.0 if step % 2 else -1.0) for step in range(steps)]
    assert curve_difference(noisy, reference) == pytest.approx(0.0)
    drifting = [10.0] * (steps - 20) + [10.2] * 20
    assert curve_difference(drifting, reference) == pytest.approx(0.02)
