"""The modules and parameters of a base by the names they have without adapters, and which of them are what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ludwig_peft_plugin.adapters.targets import ends_in
from ludwig_peft_plugin.model.dequantize import dequantizer_of

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
TRAINABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Number formats of weights that can be trained; others hold quantised ones."""


def base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a base by name, stepping over what PEFT has wrapped around them."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield name, module
    for child_name, child in module.named_children():
        yield from base_modules(child, f"{name}.{child_name}".lstrip("."))


def base_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, module, name in the module, parameter); a shared parameter under each of its names."""
    for name, module in base_modules(base):
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{own_name}".lstrip("."), module, own_name, parameter


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation with weights: one of PyTorch's, or one called so (LlamaRMSNorm)."""
    named = isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
    return named and any(parameter is not None for parameter in module._parameters.values())


def is_bias(name: str) -> bool:
    """Return whether a parameter's name in its module is that of a bias (`bias`, `in_proj_bias`)."""
    return name == "bias" or name.endswith("_bias")


def is_quantized_parameter(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Return whether the numbers of a parameter are quantised, so that no small step could change them."""
    return parameter.dtype not in TRAINABLE or (name == "weight" and dequantizer_of(module) is not None)


def output_head(base: Any) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, None for a model without (an encoder)."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def layer_list(base: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the model's list of layers and its name: of the lists in no other list, the one with most parameters."""
    found = {name: module for name, module in base_modules(base) if isinstance(module, nn.ModuleList)}
    outer = {name: found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)}
    if not outer:
        return None
    name = max(outer, key=lambda key: sum(parameter.numel() for parameter in outer[key].parameters()))
    return name, outer[name]


def targeted(name: str, wanted: list[str] | str | None) -> bool:
    """Return whether a module's name is among names (or ends of names), matches an expression, or all are wanted."""
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(ends_in(name, entry) for entry in wanted)
