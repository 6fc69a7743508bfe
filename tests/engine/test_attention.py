"""Attention over concatenated sequences equals attention over each sequence alone."""

import pytest
import torch
import torch.nn.functional as F

from ludwig_peft_plugin.engine.attention import padded_places, varlen_attention


def alone(q, k, v, lengths, window):
    """One sequence at a time, by the formula."""
    results, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        heads = q.shape[1] // k.shape[1]
        keys, values = (tensor[rows].repeat_interleave(heads, dim=1) for tensor in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[rows], keys) * 0.3
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        allowed = (distance >= 0) & (distance < (window or length))
        weights = F.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
        results.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(results)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [(5, 1, 9, 4), (6, 6, 6), (7,)])
def test_equals_one_sequence_at_a_time(lengths, window):
    torch.manual_seed(0)
    tokens = sum(lengths)
    q = torch.randn(tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(tokens, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    boundaries = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    weights = torch.randn(tokens, 4, 8, dtype=torch.float64)
    results = []
    for output in (
        varlen_attention(q, k, v, boundaries, max(lengths), 0.3, window),
        alone(q, k, v, lengths, window),
    ):
        results.append([output, *torch.autograd.grad((output * weights).sum(), (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_places_of_tokens_in_padded_rows():
    assert padded_places(torch.tensor([0, 2, 3, 6]), 4, 6).tolist() == [0, 1, 4, 8, 9, 10]
