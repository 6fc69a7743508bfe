"""Save a trained adapter so that PEFT alone loads it to the same model, and load one, exactly and without pickles."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.bottleneck import adapterhub
from ludwig_peft_plugin.adapters.folders import replaced_folder
from ludwig_peft_plugin.adapters.initial import initial_adapter, join, split, take_out_of_model
from ludwig_peft_plugin.adapters.lora_init import METHODS, init_method
from ludwig_peft_plugin.adapters.peft_build import (
    is_quantized,
    lora_layers,
    portable_name,
    translated_warnings,
    without_adapter,
    wrap_with_peft,
)
from ludwig_peft_plugin.adapters.soft_prompt_io import (
    encoder_tensors,
    fill_soft_prompt,
    is_soft_prompt,
    prepare_soft_prompt,
)
from ludwig_peft_plugin.adapters.source import CONFIG_NAME, WEIGHTS_NAME, StoredAdapter, read_adapter
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

CHANGES_BASE = (*(name for name, method in METHODS.items() if method.changes_base), "loftq")
"""Values of `init_lora_weights` in a saved config under which PEFT changes the base when it loads the adapter."""
REPEATABLE = ("pissa", "olora")
"""Those of them that need nothing but the base to be repeated."""


def save_adapter(model: PeftModel, folder: str, name: str = ADAPTER_NAME) -> None:
    """Write the adapter `name` of `model` to `folder` as `adapter_config.json` and `adapter_model.safetensors`.

    Plain PEFT loads the folder on the original base to the same model, also where the initialisation has changed the
    base's weights. Other files of an existing folder stay; an interrupted save leaves the folder as it was.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    stored = stored_adapter(model, name)
    with replaced_folder(folder) as new:
        save_file(stored.state, os.path.join(new, WEIGHTS_NAME), metadata=stored.metadata)
        with open(os.path.join(new, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(stored.config, file, indent=2, sort_keys=True)
            file.write("\n")


def stored_adapter(model: PeftModel, name: str = ADAPTER_NAME) -> StoredAdapter:
    """Return the adapter `name` of `model` as it is saved, with copies of its tensors on the CPU."""
    from peft import get_peft_model_state_dict

    config: Any = copy.copy(model.peft_config[name])
    # The base's own embeddings are not saved: they are never resized, and an adapter of them is part of the state.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state |= encoder_tensors(model, name)
    metadata = {"format": "pt"}
    initial = initial_adapter(model.get_base_model())
    if initial is not None:
        state, config, extra = join(state, config, initial)
        metadata |= extra
    # A copy each: tied or sliced tensors would share memory, which safetensors refuses.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    config.inference_mode = True
    config.base_model_name_or_path = portable_name(model.get_base_model())
    if hasattr(config, "init_lora_weights") and config.init_lora_weights != "mica":
        # The weights are there; an initialisation would only cost time where the adapter is loaded, or need data.
        config.init_lora_weights = True
    values = json.loads(json.dumps(config.to_dict(), default=sorted))
    return StoredAdapter(f"adapter {name}", values, tensors, metadata)


def load_adapter(base: PreTrainedModel | PeftModel, folder: str, *, trainable: bool) -> PeftModel:
    """Return `base`, changed in place, with the adapter in `folder`.

    Args:
        base: the base model the adapter was trained on, or a model that carries an adapter, which is replaced.
        folder: a folder that `save_adapter` or PEFT wrote, or a hub id.
        trainable: whether training goes on; otherwise all weights are frozen and the model is in evaluation mode.

    Raises:
        AdapterError: the adapter is missing, damaged, a pickle, or one of another base.
    """
    from peft import PeftModel

    plain: PreTrainedModel = without_adapter(base) if isinstance(base, PeftModel) else base
    stored = read_adapter(folder)
    prepare_soft_prompt(stored, trainable=trainable)
    stored.state, stored.config, initial = split(stored.state, stored.config, stored.metadata)
    _check_task(stored)
    changed = initial_adapter(plain)
    if changed is not None and not changed.same_as(initial):
        raise AdapterError(
            f"The adapter {folder!r} cannot be put on this base: its weights were changed by init_lora_weights: "
            f"{changed.method} of another adapter. Load the base model again."
        )
    if is_quantized(plain) and initial is not None:
        # The base cannot be changed, and need not: what was saved is an ordinary LoRA for the unchanged one.
        stored, initial = read_adapter(folder), None
    model = _rebuild(plain, stored)
    if initial is not None and changed is None:
        take_out_of_model(model, initial)
    _fill(model, stored)
    _warn_of_other_name(plain, stored)
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    model.peft_config[ADAPTER_NAME].inference_mode = not trainable
    return model


def add_stored(model: PreTrainedModel | PeftModel, stored: StoredAdapter, name: str) -> PeftModel:
    """Return `model`, changed in place, with a stored adapter as `name` beside those it has already; it is active.

    Raises:
        AdapterError: the adapter does not fit, or belongs to a base with other weights.
    """
    _check_task(stored)
    prepare_soft_prompt(stored, trainable=True)
    # What was taken out of a base (`split`) stays in: as saved, the adapter is one for the unchanged base.
    adapted = _rebuild(model, stored, name)
    adapted.set_adapter(name)
    if not any(tensor.is_meta for tensor in stored.state.values()):  # an estimate has shapes alone
        _fill(adapted, stored, name)
    _warn_of_other_name(adapted.get_base_model(), stored)
    return adapted


def fill_adapter(model: PeftModel, stored: StoredAdapter) -> None:
    """Give the adapter of `model` the stored tensors, which are for an adapter with the same options.

    Raises:
        AdapterError: a tensor has no place, or a place no tensor.
    """
    _fill(model, stored)
    _warn_of_other_name(model.get_base_model(), stored)


def _check_task(stored: StoredAdapter) -> None:
    task = stored.config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"The adapter {stored.location!r} was made for the task {task}, not for a causal language model."
        )


def _rebuild(base: PreTrainedModel | PeftModel, stored: StoredAdapter, name: str = ADAPTER_NAME) -> PeftModel:
    """Return `base` with a trainable adapter of the stored kind, whose weights are still to be filled in."""
    from peft import PeftConfig

    frozen = is_soft_prompt(stored) and stored.config["inference_mode"]
    values = {**stored.config, "inference_mode": frozen, "base_model_name_or_path": None}
    values.pop("runtime_config", None)
    if values["peft_type"] == "ADALORA" and not values.get("total_step"):
        values["total_step"] = 10_000  # PEFT insists on a schedule, also for an adapter that is trained already
    method = str(values.get("init_lora_weights"))
    changing = method.startswith(CHANGES_BASE)
    if changing and (is_quantized(base) or not method.startswith(REPEATABLE)):
        raise AdapterError(
            f"The adapter {stored.location!r} was saved with init_lora_weights: {method} and without being converted, "
            "so it only fits the changed base it was trained on. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    if "init_lora_weights" in values and (method != "mica" or is_quantized(base)):
        values["init_lora_weights"] = True
        values["eva_config"] = values["corda_config"] = values["lora_ga_config"] = None
        values["loftq_config"] = {}
    with translated_warnings():
        try:
            config = PeftConfig.from_peft_type(**values)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"The {CONFIG_NAME} of the adapter {stored.location!r} is damaged: {error}") from error
    try:
        model = wrap_with_peft(base, config, name)
    except AdapterError as error:
        raise AdapterError(f"{_misfit(base, stored)} {error}") from error
    if changing:
        apply = init_method(method).apply
        assert apply is not None
        apply(model, lora_layers(model), method, None)
    return model


def _fill(model: PeftModel, stored: StoredAdapter, name: str = ADAPTER_NAME) -> None:
    """Load the stored tensors into the adapter `name`: each must find its place, and each place its tensor."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base = model.get_base_model()
    if is_soft_prompt(stored):
        fill_soft_prompt(model, stored, name, _misfit(base, stored))
        return
    if adapterhub.METADATA_KEY in stored.metadata:
        state = adapterhub.peft_state(model, stored.state, stored.location, name)
        stored = dataclasses.replace(stored, state=state)
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key in sorted(expected.keys() & stored.state.keys()):
        mine, theirs = tuple(expected[key].shape), tuple(stored.state[key].shape)
        if mine != theirs:
            raise AdapterError(f"{_misfit(base, stored)} {key} has shape {list(theirs)} there, and {list(mine)} here.")
    missing = sorted(expected.keys() - stored.state.keys())
    foreign = sorted(stored.state.keys() - expected.keys())
    if missing and not foreign:
        raise AdapterError(f"{_misfit(base, stored)} {len(missing)} of its tensors are missing, as {missing[0]}.")
    try:
        result = set_peft_model_state_dict(model, stored.state, adapter_name=name)
    except (KeyError, RuntimeError) as error:
        raise AdapterError(f"{_misfit(base, stored)} {' '.join(str(error).split())}") from error
    # PEFT knows older names of some tensors, so what it did with them counts, not the names alone.
    if result.unexpected_keys:
        raise AdapterError(
            f"{_misfit(base, stored)} {len(result.unexpected_keys)} of its tensors have no place here, as "
            f"{result.unexpected_keys[0]}."
        )
    if unfilled := _unfilled(model, set(result.missing_keys), name):
        raise AdapterError(f"{_misfit(base, stored)} {len(unfilled)} of its tensors are missing, as {unfilled[0]}.")


def _unfilled(model: PeftModel, missing: set[str], adapter: str) -> list[str]:
    """Return the trained parameters of `adapter` none of whose names (shared ones have several) was loaded."""
    alone = len(model.peft_config) == 1
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and (alone or adapter in name.split(".")):
            names.setdefault(id(parameter), []).append(name)
    return [spellings[0] for spellings in names.values() if missing.issuperset(spellings)]


def _misfit(base: PreTrainedModel, stored: StoredAdapter) -> str:
    theirs = stored.config.get("base_model_name_or_path")
    return f"The adapter {stored.location!r}, made for the base {theirs!r}, does not fit {portable_name(base)!r}:"


def _warn_of_other_name(base: PreTrainedModel, stored: StoredAdapter) -> None:
    """Warn if the adapter names another base than this one, although its weights fit."""
    theirs, mine = stored.config.get("base_model_name_or_path"), portable_name(base)
    if theirs and mine and os.path.basename(os.path.normpath(theirs)) != os.path.basename(os.path.normpath(mine)):
        logger.warning(
            "The adapter %s was made for the base %r and is put on %r. Its weights fit; whether the two are the same "
            "model only you can know.",
            stored.location,
            theirs,
            mine,
        )
