"""The loss in chunks is the plain one, gradients included, whatever number of targets there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ludwig_peft_plugin.engine import loss
from ludwig_peft_plugin.engine.loss import chunked_cross_entropy, fused_linear_cross_entropy, load_kernels

VOCABULARY, HIDDEN = 300, 32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to compute; chunks are as small as they can be, so that there are several."""
    monkeypatch.setattr(loss, "LOGITS_BYTES", 1)
    monkeypatch.setattr(loss, "ROWS_OF_A_TRAINED_HEAD", 2 * loss.ROW_STEP)
    return str(request.param)


def inputs(device: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (count,))
    return hidden.to(device).requires_grad_(), weight.to(device), targets.to(device)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("count", [1, 127, 128, 130, 700])
def test_equals_the_plain_loss(device: str, count: int, trained: bool) -> None:
    hidden, weight, targets = inputs(device, count)
    weight.requires_grad_(trained)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (3 * expected.sum()).backward()
    gradients = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
    assert len(gradients) == 1 + trained
    for leaf in (hidden, weight):
        leaf.grad = None
    if trained:
        total, losses, hits = chunked_cross_entropy(lambda states: states @ weight.T, hidden, targets)
    else:
        total, losses, hits = fused_linear_cross_entropy(hidden, weight, targets)
    (3 * total).backward()
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total.detach(), expected.detach().sum())
    assert torch.equal(hits, (hidden @ weight.T).argmax(1) == targets)
    for ours, other in zip([leaf.grad for leaf in (hidden, weight) if leaf.grad is not None], gradients, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_a_small_vocabulary_has_no_more_sizes_of_chunks_than_a_large_one() -> None:
    assert loss.rows_per_chunk(torch.empty(300, 8)) == loss.ROWS_OF_A_CHUNK
    assert loss.rows_per_chunk(torch.empty(128_256, 8, dtype=torch.bfloat16)) == 2048
    assert loss.rows_per_chunk(torch.empty(10**7, 8)) == loss.ROW_STEP


def test_every_size_is_loaded_once_and_none_that_takes_much_more_than_the_batch() -> None:
    loaded, found = 0, []
    for targets in (100, 128, 129, 2000, 5000):
        sizes = list(loss._sizes_to_load(loaded, targets, 1024))
        loaded = sizes[-1] if sizes else loaded
        found.append(sizes)
    assert found == [[128, 256], [], [384], [512, 640, 768, 896, 1024], []]


@pytest.mark.gpu
def test_a_new_number_of_targets_does_not_wait_for_the_gpu() -> None:
    """A matrix kernel that is used for the first time is loaded, which takes until the GPU has nothing left to do."""
    weight = torch.randn(128_256, 2048, device="cuda", dtype=torch.bfloat16)

    def run(count: int) -> bool:
        """Return whether the GPU was done with what it had to do before when the loss was on its way."""
        hidden = torch.randn(count, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(count, device="cuda", dtype=torch.int64)
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # cycles, half a second
        before = torch.cuda.Event()
        before.record()
        fused_linear_cross_entropy(hidden, weight, targets)[0].backward()
        return before.query()

    chunk = loss.rows_per_chunk(weight)
    load_kernels(weight, chunk)
    run(chunk)
    assert not any(run(count) for count in (chunk + 67, chunk + 200, chunk + 333, chunk + 417, chunk + 850))
