"""Matrix products whose results are summed and kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32; 16-bit inputs are summed in float32 and not rounded in between."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
