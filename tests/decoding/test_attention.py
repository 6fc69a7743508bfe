"""One new token a row against cached keys: what is seen, and that shared heads need no copies."""

import pytest
import torch
import torch.nn.functional as F

from ludwig_peft_plugin.decoding.attention import Visible, new_token_attention


@pytest.mark.parametrize(("window", "seen"), [(None, [3, 1]), (2, [2, 1]), (100, [3, 1])])
def test_a_token_sees_its_past_within_the_window(window, seen):
    mask = Visible(torch.tensor([2, 0]), 5).mask(window, torch.float32)
    assert mask.shape == (2, 1, 1, 5)
    assert (mask == 0).sum(dim=-1).flatten().tolist() == seen
    assert mask[0, 0, 0, 2] == 0
    assert mask[0, 0, 0, 3] == -torch.inf


def test_masks_are_made_once_for_all_layers():
    visible = Visible(torch.tensor([2, 0]), 5)
    assert visible.mask(2, torch.float32) is visible.mask(2, torch.float32)
    assert visible.mask(2, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_keys(key_heads):
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8)
    key, value = torch.randn(2, 3, key_heads, 6, 8).unbind()
    mask = Visible(torch.tensor([5, 0, 2]), 6).mask(None, torch.float32)
    repeated = [tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(new_token_attention(query, key, value, mask, 0.3), expected.transpose(1, 2))
