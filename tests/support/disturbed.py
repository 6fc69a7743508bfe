"""Weights away from their start, where most adapters do nothing and any two computations would agree."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def disturbed(model: Any, spread: float, seed: int = 5) -> Any:
    """Return `model` with noise of standard deviation `spread`, always the same, on every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += (spread * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model
