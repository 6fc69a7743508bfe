"""Write and read the weights in Ludwig's model folder: an adapter, several adapters, or a full model."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from peft import PeftModel

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.base_model import load_merged_model

if TYPE_CHECKING:
    from ludwig_peft_plugin.model.llm import PeftLLM

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_weights(llm: PeftLLM, folder: str) -> None:
    """Write the adapter or, where there is none, the whole model to `folder`, as safetensors."""
    if isinstance(llm.model, PeftModel) and llm.config_obj.adapters is not None:
        from ludwig_peft_plugin.adapters.several.attach import save_adapters

        save_adapters(llm.model, llm.config_obj.adapters, folder)
        return
    if isinstance(llm.model, PeftModel):
        from ludwig_peft_plugin.adapters.io import save_adapter

        save_adapter(llm.model, folder)
        return
    from ludwig_peft_plugin.adapters.folders import replaced_folder

    with replaced_folder(folder) as new:
        llm.model.save_pretrained(new)
    # Ludwig saves the adapter before it merges; a merged model must not be taken for that adapter.
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def load_weights(llm: PeftLLM, folder: str) -> None:
    """Load `folder` into `llm`.

    Raises:
        ModelError: the folder is missing.
        AdapterError: the adapter in it is damaged or belongs to another base.
    """
    if not os.path.isdir(folder):
        raise ModelError(f"The saved model has no weights: the folder {folder!r} does not exist.")
    if llm.config_obj.adapters is not None:
        from ludwig_peft_plugin.adapters.several.attach import load_adapters

        trainable = llm.config_obj.trainer.type != "none"
        llm.model = load_adapters(llm.model, llm.config_obj.adapters, folder, trainable=trainable)
        llm._adapter_initialized = True
    elif os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        from ludwig_peft_plugin.adapters.io import load_adapter

        llm.model = load_adapter(llm.model, folder, trainable=llm.config_obj.trainer.type != "none")
        llm._adapter_initialized = True
    else:
        logger.info("The saved model is a full one: its adapter was merged, or it was trained without.")
        llm.model = load_merged_model(llm.config_obj, folder, llm.curr_device)
        llm._adapter_initialized = bool(llm.config_obj.adapter)
