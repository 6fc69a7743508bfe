"""Several adapters on a base without data: PEFT leaves those after the first where they were made, on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ludwig_peft_plugin.estimate.replace import replaced

META = torch.device("meta")


@contextmanager
def moved_to_layers() -> Iterator[None]:
    """Within the context, each new adapter of a layer on the meta device is moved there.

    PEFT moves an adapter to its layer's device unless another one is on the meta device, which it takes for a sign that
    weights are loaded later.
    """
    move = BaseTunerLayer._move_adapter_to_device_of_base_layer

    def moved(layer: Any, name: str, device: torch.device | None = None) -> None:
        move(layer, name, device)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor) or weight.device != META:
            return
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            entries = getattr(layer, attribute, None)
            if isinstance(entries, nn.ParameterDict) and name in entries:
                entry = entries[name]
                entries[name] = nn.Parameter(entry.detach().to(META), entry.requires_grad)
            elif isinstance(entries, nn.ModuleDict) and name in entries:
                entries[name].to(META)

    with replaced(BaseTunerLayer, {"_move_adapter_to_device_of_base_layer": moved}):
        yield
