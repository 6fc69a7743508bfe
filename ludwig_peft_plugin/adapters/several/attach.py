"""Put several named adapters on one base: new ones, trained ones, or those of a saved model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME, Batches
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.folders import replaced_folder
from ludwig_peft_plugin.adapters.initial import initial_adapter
from ludwig_peft_plugin.adapters.io import add_stored, save_adapter, stored_adapter
from ludwig_peft_plugin.adapters.several.active import set_adapter
from ludwig_peft_plugin.adapters.several.merge import add_merged
from ludwig_peft_plugin.adapters.source import CONFIG_NAME, StoredAdapter, read_adapter
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.config.adapters_section import AdaptersConfig

logger = logging.getLogger(__name__)


def attach_adapters(base: PreTrainedModel, section: AdaptersConfig, *, batches: Batches | None = None) -> PeftModel:
    """Return `base`, changed in place, with the adapters of an `adapters` section, its active ones trainable.

    Each is made on the base alone, exactly as a single `adapter` would be, and then put beside the others.

    Args:
        base: the loaded base model, on the device on which it trains.
        section: the names, types, merge and active adapters.
        batches: yields training batches on the base's device, for initialisations that read data.

    Raises:
        AdapterError: one cannot be attached, or they cannot share a base.
    """
    made = {}
    for name, adapter in section.objects().items():
        try:
            alone = attach_adapter(base, adapter, batches=batches)
        except AdapterError as error:
            raise AdapterError(f"adapters.adapters.{name}: {error}") from error
        if (changed := initial_adapter(alone.get_base_model())) is not None:
            raise AdapterError(
                f"adapters.adapters.{name}.init_lora_weights: {changed.method} changes the base's weights, which "
                "other adapters share. Use init_lora_weights: default, or train it alone (adapter: ...)."
            )
        made[name] = stored_adapter(alone)
        base = plain_base(alone)
    model = _together(base, made)
    if section.merge is not None:
        add_merged(model, section.merge)
    _activate(model, section, trainable=True)
    logger.info("Adapters: %s; active: %s", ", ".join(model.peft_config), ", ".join(section.active_names()))
    return model


def save_adapters(model: PeftModel, section: AdaptersConfig, folder: str) -> None:
    """Write each adapter to the folder of its name below `folder`, a merged one as its sources are now.

    Raises:
        CheckpointError: a folder cannot be written.
    """
    renew_merge(model, section)
    with replaced_folder(folder) as new:  # all of one moment, or none
        for name in model.peft_config:
            save_adapter(model, os.path.join(new, name), name)


def renew_merge(model: PeftModel, section: AdaptersConfig) -> None:
    """Make the merged adapter, if there is one that is not trained itself, anew from its sources as they are now."""
    if section.merge is not None and section.merge.name not in section.trained_names():
        add_merged(model, section.merge)


def load_adapters(
    base: PreTrainedModel | PeftModel, section: AdaptersConfig, folder: str, *, trainable: bool
) -> PeftModel:
    """Return `base`, changed in place, with the adapters that `save_adapters` or stock Ludwig wrote to `folder`.

    Args:
        base: the base they were trained on, or a model that carries adapters, which are replaced.
        section: the config's section, which names them.
        folder: has a folder for each.
        trainable: whether training goes on; otherwise all weights are frozen and the model is in evaluation mode.

    Raises:
        AdapterError: one is missing, damaged, or does not fit.
    """
    names = [*section.adapters, *([section.merge.name] if section.merge else [])]
    model = _together(plain_base(base), {name: _read(folder, name) for name in names})
    _activate(model, section, trainable=trainable)
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    return model


def plain_base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the base under a model's adapters, which are taken off."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    plain: PreTrainedModel = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()
    return plain


def _together(base: PreTrainedModel, adapters: Mapping[str, StoredAdapter]) -> PeftModel:
    """Return `base` with stored adapters, by name."""
    parts = {part for path, _ in base.named_modules() for part in path.split(".")}
    model: Any = base
    for name, stored in adapters.items():
        if name in parts:
            raise AdapterError(
                f"adapters.adapters.{name}: the base has a module of this name; give the adapter another one."
            )
        try:
            model = add_stored(model, stored, name)
        except AdapterError as error:
            raise AdapterError(f"adapters.adapters.{name}: {error}") from error
    return model


def _activate(model: PeftModel, section: AdaptersConfig, *, trainable: bool) -> None:
    set_adapter(model, section.active_names(), trained=section.trained_names() if trainable else ())


def _read(folder: str, name: str) -> StoredAdapter:
    """Return an adapter of a model's folder; PEFT, and so stock Ludwig, keeps one called `default` at the top."""
    own = os.path.join(folder, name)
    at_top = name == ADAPTER_NAME and not os.path.isdir(own) and os.path.isfile(os.path.join(folder, CONFIG_NAME))
    try:
        return read_adapter(folder if at_top else own)
    except AdapterError as error:
        raise AdapterError(f"adapters.adapters.{name}: {error}") from error
