"""Folders in the format of AdapterHub's library `adapters`: read as, and written from, bottleneck adapters.

Such a folder holds `adapter_config.json`, whose `config` are the options, and `adapter.safetensors` with names as
`model.layers.0.output_adapters.adapters.NAME.adapter_up.weight`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ludwig_peft_plugin.adapters.bottleneck.config import ARCHITECTURES, NAME, BottleneckConfig
from ludwig_peft_plugin.adapters.bottleneck.layer import BottleneckLayer
from ludwig_peft_plugin.adapters.bottleneck.places import ATTENTION, FEED_FORWARD
from ludwig_peft_plugin.errors import AdapterError

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter.safetensors"
PICKLE_NAME = "pytorch_adapter.bin"
VERSION = "adapters.1.3.0"
"""What the written folders say they were written by: the library whose format they follow."""

METADATA_KEY = "adapterhub"
"""Marks the weights of an adapter that was read from such a folder."""

BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Non-linearities that folders without a version call by another name."""

UNSUPPORTED = {
    "phm_layer": "Compacter's hypercomplex layers",
    "inv_adapter": "invertible adapters",
    "use_gating": "gates, which average over the sequence, later tokens included",
    "cross_adapter": "adapters of cross-attention",
}
"""Options that a bottleneck adapter here does not have, and what they are."""

PLACES = {
    "attention_adapters": ATTENTION,
    "attention.output": ATTENTION,
    "output_adapters": FEED_FORWARD,
    "output": FEED_FORWARD,
}
_KEY = re.compile(
    rf"(?:^|\.)(?P<layer>\d+)\.(?P<place>{'|'.join(map(re.escape, PLACES))})\.adapters\.[^.]+\.(?P<part>.+)$"
)


def is_adapterhub(config: Any) -> bool:
    """Return whether an `adapter_config.json` is AdapterHub's rather than PEFT's."""
    return isinstance(config, dict) and "peft_type" not in config and "config" in config and "model_type" in config


def read_config(config: dict[str, Any], location: str) -> dict[str, Any]:
    """Return the PEFT config that does the same as AdapterHub's, as a mapping.

    Raises:
        AdapterError: it is no bottleneck adapter, or one with parts that are unknown here.
    """
    options = dict(config["config"]) if isinstance(config["config"], dict) else {}
    kind = options.get("architecture")
    if kind is not None or "reduction_factor" not in options:
        raise AdapterError(
            f"The AdapterHub folder {location!r} holds {kind or config['config']!r}; of that library's adapters only "
            "bottleneck ones can be read."
        )
    if found := [f"{name}, {what}" for name, what in UNSUPPORTED.items() if options.get(name)]:
        raise AdapterError(f"The AdapterHub folder {location!r} uses what cannot be rebuilt here: {'; '.join(found)}.")
    if options.get("stochastic_depth"):
        logger.warning("%s was trained with stochastic_depth, which has no effect here.", location)
    activation = str(options["non_linearity"]).lower()
    if "version" not in config:
        activation = BEFORE_VERSIONS.get(activation, activation)
    known = {name: options[name] for name in BottleneckConfig.__dataclass_fields__ if name in options}
    known |= {"non_linearity": activation, "leave_out": sorted(options.get("leave_out") or [])}
    if known.get("init_weights") not in ("bert", "mam_adapter", "houlsby"):
        known.pop("init_weights", None)
    name = config.get("model_name")
    return {
        "peft_type": NAME,
        "architecture": _nearest(options),
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        **known,
    }


def peft_state(model: nn.Module, state: dict[str, Tensor], location: str, adapter: str) -> dict[str, Tensor]:
    """Return tensors read from AdapterHub's folder under the names PEFT saves those of `model`'s `adapter` by.

    Raises:
        AdapterError: a tensor belongs to no adapter of the model, or AdapterHub puts adapters of such models elsewhere.
    """
    layers = {(layer.site.layer, layer.site.location): (name, layer) for name, layer in _layers(model)}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _KEY.search(key)
        place = match and (int(match["layer"]), PLACES[match["place"]])
        if not match or place not in layers:
            raise AdapterError(f"The AdapterHub folder {location!r} does not fit this model: {key} has no place in it.")
        name, layer = layers[place]
        _check_exchange(layer)
        part = _our_part(match["part"], ln_before=adapter in layer.bottleneck_norm_before)
        if part is None:
            raise AdapterError(f"The AdapterHub folder {location!r} holds a tensor that is unknown here: {key}.")
        result[f"{name}.{part}"] = tensor
    return result


def write_folder(
    model: Any, folder: str | Path, name: str, adapter: str = "default", base_model: str | None = None
) -> None:
    """Write the adapter `adapter` of a PEFT model so that `load_adapter` of AdapterHub's library loads it as `name`.

    Args:
        model: the PEFT model.
        folder: where to write; it is made if it is not there.
        name: the adapter's name in the folder.
        adapter: its name in the model.
        base_model: what the folder calls the base; None takes the name the model has for it.

    Raises:
        AdapterError: that library puts adapters of such a model elsewhere.
    """
    config, base = model.peft_config[adapter], model.get_base_model()
    state: dict[str, Tensor] = {}
    for _, layer in _layers(model):
        _check_exchange(layer)
        if adapter in layer.options:
            prefix = f"{layer.site.adapterhub}.adapters.{name}"
            for part, tensor in _their_parts(layer, adapter).items():
                # Clones: the new norm has two names, and safetensors refuses shared memory.
                state[f"{prefix}.{part}"] = tensor.detach().cpu().clone().contiguous()
    values = {
        "config": _their_config(config, base.config.hidden_size),
        "hidden_size": base.config.hidden_size,
        "model_class": type(base).__name__,
        "model_name": base_model or config.base_model_name_or_path or "",
        "model_type": base.config.model_type,
        "name": name,
        "version": VERSION,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
    (target / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def exchange_obstacle(model: nn.Module) -> str | None:
    """Return why AdapterHub's library could not compute what `model` does with its adapter, None if it can."""
    for _, layer in _layers(model):
        if layer.site.adapterhub is None:
            return (
                f"AdapterHub's library puts adapters of such a model elsewhere than at {layer.site.name}; "
                "a folder of PEFT's format (format: adapter) holds it."
            )
    return None


def _check_exchange(layer: BottleneckLayer) -> None:
    if (obstacle := exchange_obstacle(layer)) is not None:
        raise AdapterError(obstacle)


def _layers(model: nn.Module) -> list[tuple[str, BottleneckLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]


def _our_part(part: str, *, ln_before: bool) -> str | None:
    """Return the name of a tensor within a layer here, from its name within an adapter there."""
    module, _, kind = part.rpartition(".")
    down = {"adapter_down.0": "norm_before", "adapter_down.1": "down"} if ln_before else {"adapter_down.0": "down"}
    names = {
        **down,
        "adapter_norm_before": "norm_before",
        "adapter_up": "up",
        "adapter_norm_after": "norm_after",
    }
    if part == "scaling":
        return "bottleneck_scaling"
    return f"bottleneck_{names[module]}.{kind}" if module in names else None


def _their_parts(layer: BottleneckLayer, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names within one there."""
    modules: dict[str, Any] = {"adapter_up": layer.bottleneck_up[adapter]}
    first = 0
    if adapter in layer.bottleneck_norm_before:
        modules["adapter_norm_before"] = modules["adapter_down.0"] = layer.bottleneck_norm_before[adapter]
        first = 1
    modules[f"adapter_down.{first}"] = layer.bottleneck_down[adapter]
    if adapter in layer.bottleneck_norm_after:
        modules["adapter_norm_after"] = layer.bottleneck_norm_after[adapter]
    parts = {f"{name}.{kind}": getattr(module, kind) for name, module in modules.items() for kind in ("weight", "bias")}
    if adapter in layer.bottleneck_scaling:
        parts["scaling"] = layer.bottleneck_scaling[adapter]
    return parts


def _their_config(config: BottleneckConfig, hidden: int) -> dict[str, Any]:
    """Return AdapterHub's options that do the same."""
    factor: Any = config.reduction_factor
    if config.bottleneck_size is not None:
        factor = hidden / config.bottleneck_size
        if hidden // factor != config.bottleneck_size:  # rounded the wrong way
            factor = math.nextafter(factor, 0)
    shared = (
        "mh_adapter",
        "output_adapter",
        "non_linearity",
        "original_ln_before",
        "original_ln_after",
        "ln_before",
        "ln_after",
        "init_weights",
        "is_parallel",
        "residual_before_ln",
        "adapter_residual_before_ln",
        "leave_out",
        "dropout",
    )
    scaling = config.scaling if isinstance(config.scaling, str) else float(config.scaling or 0)
    activation = "leakyrelu" if config.non_linearity == "leaky_relu" else config.non_linearity
    return {name: getattr(config, name) for name in shared} | {
        "non_linearity": activation,
        "reduction_factor": factor,
        "scaling": scaling,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "cross_adapter": False,
        "phm_layer": False,
        "use_gating": False,
        "stochastic_depth": 0.0,
    }


def _nearest(options: dict[str, Any]) -> str:
    """Return the architecture that AdapterHub's options come nearest to; they decide everything themselves."""
    if options.get("is_parallel"):
        return "parallel"
    mine = {name: options.get(name) for name in ("mh_adapter", "original_ln_before")}
    fits = [key for key, preset in ARCHITECTURES.items() if mine.items() <= preset.items()]
    return fits[0] if fits else "pfeiffer"
