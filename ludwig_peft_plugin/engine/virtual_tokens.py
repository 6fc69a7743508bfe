"""The virtual tokens that a soft prompt puts before each row, as a PEFT model's active adapter gives them.

Soft prompts come in two kinds, and PEFT's prompt encoder gives either. Embeddings (prompt tuning, p-tuning) are inputs
of the first layer like those of tokens; keys and values (prefix tuning) are seen by every layer's attention. Both take
the first P positions of each sequence. PEFT writes them into padded rows in its own `forward`; here they are put before
every sequence of a flat row, where that is how a model runs.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ludwig_peft_plugin.engine.cached_tokens import CachedTokens
from ludwig_peft_plugin.engine.embedded_tokens import EmbeddedTokens
from ludwig_peft_plugin.engine.model_input import VirtualTokens
from ludwig_peft_plugin.errors import ModelError

KEYS_AND_VALUES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""PEFT's prompt methods whose encoder gives keys and values; the others give embeddings."""


def virtual_tokens(model: Any, task_ids: Tensor | None = None) -> VirtualTokens | None:
    """Return the virtual tokens of a PEFT model's active adapter, None where it has none or is switched off.

    Args:
        model: a transformers model, with or without PEFT around it.
        task_ids: which task each row belongs to, shape (B,), for adapters with a prompt for each task.

    Raises:
        ModelError: the adapter needs the tasks.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or getattr(model, "_adapters_disabled", False):
        return None
    if needs_tasks(model):
        if task_ids is None:
            raise ModelError(
                "The adapter has a prompt for each task, and the tasks of these rows are not known. Use a dataset with "
                "the column that adapter.task_column names."
            )
        prompts: Tensor = model.get_prompt(len(task_ids), task_ids)
        return EmbeddedTokens(prompts)
    prompt = model.get_prompt(1)
    if config.peft_type in KEYS_AND_VALUES:
        return CachedTokens([(layer.keys[0], layer.values[0]) for layer in prompt.layers])
    return EmbeddedTokens(prompt)


def needs_tasks(model: Any) -> bool:
    """Return whether the virtual tokens of a PEFT model differ between tasks."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return False
    return "task_ids" in inspect.signature(model.prompt_encoder[model.active_adapter].forward).parameters
