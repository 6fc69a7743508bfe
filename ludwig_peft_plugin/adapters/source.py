"""Find and read a trained adapter, in a local folder or on the hub: its config and its safetensors, never a pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ludwig_peft_plugin.adapters.bottleneck import adapterhub
from ludwig_peft_plugin.adapters.folders import recover
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass
class StoredAdapter:
    """An adapter as it was saved.

    Attributes:
        location: the folder or hub id, for messages.
        config: what its adapter_config.json says.
        state: its tensors on the CPU, by PEFT's names.
        metadata: the header of its weights file.
    """

    location: str
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_adapter(location: str) -> StoredAdapter:
    """Return the adapter in a local folder or hub repository.

    Raises:
        AdapterError: it does not exist, a part is missing or damaged, or its weights are a pickle.
    """
    recover(location)
    local = os.path.isdir(location)
    if not local and (os.path.isabs(location) or location.startswith((".", "~")) or location.count("/") != 1):
        raise AdapterError(f"The adapter folder {location!r} does not exist.")
    config_file = _file(location, CONFIG_NAME, local)
    if config_file is None:
        raise AdapterError(f"{location!r} is no adapter: it holds no {CONFIG_NAME}.")
    config = _read_config(location, config_file)
    theirs = adapterhub.is_adapterhub(config)
    weights_name = adapterhub.WEIGHTS_NAME if theirs else WEIGHTS_NAME
    pickle_name = adapterhub.PICKLE_NAME if theirs else PICKLE_NAME
    weights_file = _file(location, weights_name, local)
    if weights_file is None:
        if _file(location, pickle_name, local) is not None:
            theirs_call = "adapters and call save_adapter(..., use_safetensors=True)"
            call = theirs_call if theirs else "PEFT and call save_pretrained"
            raise AdapterError(
                f"The adapter {location!r} holds its weights as a pickle ({pickle_name}), which can run code, so it "
                f"is not loaded. Save it as {weights_name}: where you trust it, load it with {call}."
            )
        raise AdapterError(f"The adapter {location!r} has no weights: {weights_name} is missing.")
    try:
        with safe_open(weights_file, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"The weights of the adapter {location!r} are damaged ({weights_name}: {error}); save or download it again."
        ) from error
    if theirs:
        metadata = {adapterhub.METADATA_KEY: str(config.get("name"))}
        config = adapterhub.read_config(config, location)
    return StoredAdapter(location, config, state, metadata)


def _read_config(location: str, path: str) -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise AdapterError(f"The {CONFIG_NAME} of the adapter {location!r} is damaged: {error}.") from error
    if adapterhub.is_adapterhub(config):
        return dict(config)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(
            f"The {CONFIG_NAME} of the adapter {location!r} names the peft_type {kind!r}, which the installed PEFT "
            "does not know; it is damaged, or made with a newer PEFT."
        )
    return dict(config)


def _file(location: str, name: str, local: bool) -> str | None:
    """Return the path of a file of the adapter, downloaded if need be, None if it has none of this name."""
    if local:
        path = os.path.join(location, name)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(location, name))
    except LocalEntryNotFoundError as error:
        raise AdapterError(_unreachable(location, error)) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(_unreachable(location, error)) from error


def _unreachable(location: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"The adapter {location!r} is no folder here and cannot be loaded from the Hugging Face hub: {reason[:300]} "
        "Check the name, your network and, for gated repositories, `hf auth login`."
    )
