"""The text encoder `llm` of `model_type: ecd` with an adapter that is really put on, saved and loaded.

Ludwig puts the adapter on in `prepare_for_training`, which its model calls on the feature and not on the encoder: all
of the language model trains instead. Were it put on there, a saved model could not be loaded, which has no adapter when
its weights are read, and `state_dict` would drop the weights of the features before the encoder.
"""

from __future__ import annotations

import logging
from typing import Any

from ludwig.encoders.text_encoders import LLMEncoder
from torch import nn

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.encoders.pretrained import load_pretrained

logger = logging.getLogger(__name__)


class PeftLLMEncoder(LLMEncoder):
    """A causal language model whose last hidden states, [rows, length, hidden], encode a text.

    With an adapter, the adapter's weights alone are trained and saved; the base is loaded by its name.
    """

    model: Any

    def __init__(self, encoder_config: Any = None, **kwargs: Any) -> None:
        super().__init__(encoder_config, **kwargs)
        if self.config.adapter:
            if self.config.quantization:
                self.prepare_for_quantized_training()
            adapter: Any = AdapterSelection().resolve(self.config.adapter)
            self.model = attach_adapter(self.model, adapter.model_copy(update={"pretrained_adapter_weights": None}))
            if adapter.pretrained_adapter_weights and not getattr(self.config, "saved_weights_in_checkpoint", False):
                load_pretrained(self.model, adapter)
            self.adapter_is_initialized = True
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            logger.info("Encoder llm: adapter %s trains %d parameters.", adapter.type, trained)

    def prepare_for_training(self) -> None:
        """Do nothing: the adapter is there from the start, so that a saved model can be loaded."""

    def resume_from_checkpoint(self, checkpoint_path: str) -> None:
        """Do nothing: Ludwig's trainer loads the adapter's weights with the others."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the weights of the adapter, or all where there is none, added to `destination`."""
        state = nn.Module.state_dict(self, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in self._left_out():
            state.pop(f"{prefix}{name}", None)
        return state

    def remove_missing_non_adapter_keys(self, module: Any, incompatible_keys: Any) -> None:
        """Take what is not saved out of the keys that torch reports as missing when weights are loaded."""
        left_out = self._left_out()
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not any(key == name or key.endswith(f".{name}") for name in left_out)]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)

    def _left_out(self) -> set[str]:
        """Return the names of what the base holds, which is not saved beside an adapter."""
        if not self.adapter_is_initialized:
            return set()
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        every = nn.Module.state_dict(self).keys()
        return {name for name in every if name not in trained and ADAPTER_NAME not in name.split(".")}
