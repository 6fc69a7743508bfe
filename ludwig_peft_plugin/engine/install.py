"""Prepare a transformers model for padding-free training: its attention and, where possible, fused layers."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from ludwig_peft_plugin.engine import transformers_attention
from ludwig_peft_plugin.engine.fused.group import refresh
from ludwig_peft_plugin.engine.fused.layer import LAYERS, FusedForward, obstacle

logger = logging.getLogger(__name__)

SWITCH = "LUDWIG_PEFT_FUSED"
"""Environment variable; 0 leaves the layers as transformers wrote them."""


def prepare(base: Any) -> None:
    """Make `base` attend within sequences and fuse its layers, once; it generates as before."""
    if base.config._attn_implementation == transformers_attention.NAME:
        return
    transformers_attention.register()
    base.config._attn_implementation = transformers_attention.NAME
    if os.environ.get(SWITCH, "1") == "0":
        return
    layers = [layer for layer in decoder_layers(base) if getattr(layer, "_compiled_call_impl", None) is None]
    reasons = {reason for layer in layers if (reason := obstacle(layer, base.dtype)) is not None}
    for index, layer in enumerate(layers):
        last = layer is decoder_layers(base)[-1]
        layer.forward = FusedForward(layer, index, last=last)  # decides at each call, since adapters come and go
    if layers and not reasons:
        logger.info("Fused layers: %d of %d.", len(layers), len(layers))
    elif reasons:
        logger.info("Layers run as transformers wrote them (%s).", "; ".join(sorted(reasons)))


def refresh_adapters(base: Any) -> None:
    """Let the fused layers take the adapters' current values, before a forward pass."""
    refresh([group for layer in fused_layers(base) for group in layer.groups(base.dtype)])


def fused_layers(base: Any) -> list[FusedForward]:
    """Return what stands for the forward of each fused layer."""
    forwards = [layer.__dict__.get("forward") for layer in decoder_layers(base)]
    return [forward for forward in forwards if isinstance(forward, FusedForward)]


def selects_rows(base: Any) -> bool:
    """Return whether the last layer takes `output_rows`, the places whose states are wanted."""
    fused = fused_layers(base)
    return bool(fused) and fused[-1].last


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """Return the decoder layers that can be fused in principle."""
    return [module for module in base.modules() if type(module).__name__ in LAYERS]
