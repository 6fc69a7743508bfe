"""`trainer.compile`: torch.compile for the decoder layers that are not fused kernels already."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.fused.layer import obstacle
from ludwig_peft_plugin.engine.install import SWITCH

logger = logging.getLogger(__name__)


def compile_layers(model: Any) -> int:
    """Have each decoder layer that cannot be fused compiled at its first use, and return how many there are.

    Layers are compiled one by one: they are alike, so the first one's code serves them all. To be called once the
    adapter is attached and before the first step.
    """
    base = unwrapped(model)
    fused = os.environ.get(SWITCH, "1") != "0"
    layers = _decoder_layers(base)
    remaining = [layer for layer in layers if not fused or obstacle(layer, base.dtype) is not None]
    for layer in remaining:
        layer.compile()
    if remaining:
        logger.info("trainer.compile: %d decoder layers are compiled at their first use.", len(remaining))
    else:
        logger.info("trainer.compile: nothing is left to compile, all %d layers are fused kernels.", len(layers))
    return len(remaining)


def _decoder_layers(base: Any) -> list[nn.Module]:
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in base.modules() if type(module).__name__ in names]
