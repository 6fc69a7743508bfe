"""Save and load soft prompts with the network that makes them, so that training can go on from a folder.

PEFT saves the virtual tokens a network has made (`prompt_embeddings`) and not the network. Here its weights lie beside
them in the same file, under names that PEFT passes over: plain PEFT loads the folder for prediction as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel

    from ludwig_peft_plugin.adapters.source import StoredAdapter

ENCODER = "prompt_encoder_state."
"""Begins the names of the network's weights in a saved file."""

PROMPT = "prompt_embeddings"
"""PEFT's name of the virtual tokens in a saved file."""

HELD_BY_PROMPT = frozenset({"embedding.weight", "frozen_embedding", "trainable_embedding"})
"""Weights of prompt encoders that are the virtual tokens themselves."""


def encoder_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return what PEFT does not save of the adapter `name`: the network that makes its virtual tokens, if any."""
    config: Any = model.peft_config[name]
    if not config.is_prompt_learning or config.inference_mode:
        return {}
    state = model.prompt_encoder[name].state_dict()
    return {ENCODER + key: tensor for key, tensor in state.items()} if _is_network(model, name) else {}


def _is_network(model: PeftModel, name: str) -> bool:
    """Return whether the virtual tokens of an adapter are made of more than PEFT saves."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    return bool(model.prompt_encoder[name].state_dict().keys() - HELD_BY_PROMPT - saved)


def is_soft_prompt(stored: StoredAdapter) -> bool:
    """Return whether a stored adapter is a soft prompt."""
    return "num_virtual_tokens" in stored.config


def prepare_soft_prompt(stored: StoredAdapter, *, trainable: bool) -> None:
    """Change the config of a stored soft prompt, in place, so that PEFT builds what the weights fill; others stay.

    For prediction the virtual tokens are enough. For training, the network is built where it was saved; a projected
    prefix without its network goes on as the keys and values themselves.
    """
    if not is_soft_prompt(stored):
        return
    config = stored.config
    # Where the tokens started is past, and PEFT would look for a tokenizer or a file.
    for option in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
        config.pop(option, None)
    config.pop("prompt_tuning_init_state_dict_path", None)
    if "prompt_tuning_init" in config:
        config["prompt_tuning_init"] = "RANDOM"
    config["inference_mode"] = not trainable
    if trainable and config.get("prefix_projection") and not _has_network(stored):
        config["prefix_projection"] = False


def _has_network(stored: StoredAdapter) -> bool:
    return any(key.startswith(ENCODER) for key in stored.state)


def fill_soft_prompt(model: PeftModel, stored: StoredAdapter, name: str, misfit: str) -> None:
    """Load stored tensors into the soft prompt `name`.

    Args:
        model: with the adapter as PEFT makes it from the prepared config.
        stored: what was saved.
        name: of the adapter.
        misfit: how a message begins that says that adapter and base do not fit.

    Raises:
        AdapterError: the tensors do not fit, or the network is needed and was not saved.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    encoder, config = model.prompt_encoder[name], model.peft_config[name]
    if not config.inference_mode and _has_network(stored):
        tensors = {key.removeprefix(ENCODER): t for key, t in stored.state.items() if key.startswith(ENCODER)}
        _check_shapes(tensors, encoder.state_dict(), misfit)
        encoder.load_state_dict(tensors)
        return
    if not config.inference_mode and _is_network(model, name):
        raise AdapterError(
            f"The adapter {stored.location!r} was saved without the network that makes its virtual tokens, as PEFT "
            "saves it, so it can predict but not be trained further. Start from it with adapter.type: prompt_tuning, "
            "or train anew."
        )
    tensors = {key: tensor for key, tensor in stored.state.items() if not key.startswith(ENCODER)}
    _check_shapes(tensors, get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False), misfit)
    with torch.no_grad():
        set_peft_model_state_dict(model, tensors, adapter_name=name)


def _check_shapes(stored: dict[str, Tensor], expected: dict[str, Any], misfit: str) -> None:
    """Raise AdapterError unless both have the same names and shapes."""
    missing, foreign = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise AdapterError(f"{misfit} {len(missing)} of its tensors are missing, as {missing[0]}.")
    if foreign:
        raise AdapterError(f"{misfit} {len(foreign)} of its tensors have no place here, as {foreign[0]}.")
    for key in sorted(expected):
        mine, theirs = list(expected[key].shape), list(stored[key].shape)
        if mine != theirs:
            raise AdapterError(f"{misfit} {key} has shape {theirs} there, and {mine} here.")
