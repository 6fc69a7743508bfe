"""Give an encoder that is loaded from a saved model an adapter made for the saved weights.

Ludwig builds such an encoder with random weights and loads the saved ones into it. Some methods (AdaMSS, FRoD, PSOFT)
compute fixed parts of the adapter from the encoder's weights, and these parts are not saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from ludwig.utils.torch_utils import FreezeModule

from ludwig_peft_plugin.adapters.peft_build import without_adapter

if TYPE_CHECKING:
    from peft import PeftModel

INSIDE_PEFT = ("base_model.model.", "base_layer.", "original_module.")
"""What PEFT adds to the names of a model's weights."""


class RebuildWhenLoaded:
    """Called by torch before it loads weights into an encoder's transformer: makes the adapter again, once."""

    def __init__(self, attach: Callable[[Any], PeftModel]) -> None:
        """Keep how the adapter is made: `attach` puts a new one on a transformer."""
        self._attach = attach
        self._done = False

    def install(self, transformer: FreezeModule) -> None:
        """Have torch call this for `transformer`."""
        transformer.register_load_state_dict_pre_hook(self)

    def __call__(self, transformer: Any, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        """Put the weights of the saved transformer in place, then an adapter on it; torch loads the adapter's."""
        if self._done:
            return
        self._done = True
        adapted = transformer.module
        device, training = next(adapted.parameters()).device, adapted.training
        base = without_adapter(adapted)
        inside = f"{prefix}module."
        saved = {plain_name(key.removeprefix(inside)): value for key, value in state.items() if key.startswith(inside)}
        base.load_state_dict(saved, strict=False)
        # The parts were computed on the CPU when the encoder was made, and a GPU rounds otherwise.
        base.cpu()
        transformer.module = self._attach(base).to(device).train(training)


def plain_name(name: str) -> str:
    """Return the name that a weight of an adapted model has in the model without the adapter."""
    for added in INSIDE_PEFT:
        name = name.replace(added, "")
    return name
