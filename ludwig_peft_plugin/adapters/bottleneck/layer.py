"""The layer of a bottleneck adapter: a module of the base and, behind or beside it, the adapters."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ludwig_peft_plugin.adapters.bottleneck.config import BottleneckConfig
from ludwig_peft_plugin.adapters.bottleneck.places import Site

MERGE_REFUSAL = (
    "A bottleneck adapter cannot be merged into the base's weights: a non-linear function lies between its projections."
)


class ResidualTap:
    """A hook that keeps the first input of a module until the adapter of the same forward pass takes it.

    An instance rather than a closure, so that a deep copy of a model gets taps of its own.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input."""
        self._value = args[0] if args else kwargs["hidden_states"]

    def take(self) -> Tensor | None:
        """Return the input and let go of it, so that no activation outlives its layer."""
        value, self._value = self._value, None
        return value


class BottleneckLayer(nn.Module, BaseTunerLayer):
    r"""A module whose output h, shape [..., H], goes through the active adapters, one after the other.

    With x the residual of the block, of the same shape, sigma the non-linearity and b the bottleneck's size, an adapter
    computes `f(z) = s * (U sigma(D z + d) + u)`, D of shape [b, H] and U of shape [H, b], and returns

        sequential:  f(z) + r,  z and r being h, x + h or LN(x + h) as the options say
        parallel:    f(x) + h

    to which the block adds x. Weights are float32 and so is the computation, whatever the base's dtype; nothing is
    ever read from the base's weights, so they can be stored in any form.
    """

    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_up",
        "bottleneck_norm_before",
        "bottleneck_norm_after",
        "bottleneck_scaling",
    )
    other_param_names = ("bottleneck_activation", "bottleneck_dropout", "options")

    # Inherited from PEFT, whose classes have no types here.
    active_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    _cast_input_dtype: Any

    def __init__(self, base_layer: nn.Module, site: Site, residual: nn.Module, norm: nn.Module | None) -> None:
        """Wrap a module of the base.

        Args:
            base_layer: the module whose output is h.
            site: where it lies.
            residual: the module whose first input is x.
            norm: the base's norm of x + h, None where there is none.
        """
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.tap = ResidualTap()
        self.tap_handle = residual.register_forward_pre_hook(self.tap, with_kwargs=True)
        self._norm = (norm,)  # within a tuple it is no child, whose weights would be listed twice
        self._device = next((parameter.device for parameter in residual.parameters()), torch.device("cpu"))
        self.options: dict[str, BottleneckConfig] = {}
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_norm_before = nn.ModuleDict()
        self.bottleneck_norm_after = nn.ModuleDict()
        self.bottleneck_scaling = nn.ParameterDict()
        self.bottleneck_activation = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BottleneckConfig, inference_mode: bool = False) -> None:
        """Add an adapter, or replace the one of that name.

        Raises:
            ValueError: an option cannot take effect here.
        """
        if not config.original_ln_after and self._norm[0] is not None:
            raise ValueError(
                "original_ln_after: false is not possible here: this model normalises after each sub-block, and later "
                "layers rely on it. Leave it true."
            )
        hidden, size = self.site.hidden, config.size(self.site.hidden, self.site.layer)
        self.options[adapter_name] = config
        self.bottleneck_down[adapter_name] = nn.Linear(hidden, size, dtype=torch.float32)
        self.bottleneck_up[adapter_name] = nn.Linear(size, hidden, dtype=torch.float32)
        if config.ln_before:
            self.bottleneck_norm_before[adapter_name] = nn.LayerNorm(hidden, dtype=torch.float32)
        if config.ln_after:
            self.bottleneck_norm_after[adapter_name] = nn.LayerNorm(hidden, dtype=torch.float32)
        if isinstance(config.scaling, str):
            length = 1 if config.scaling == "learned" else hidden
            self.bottleneck_scaling[adapter_name] = nn.Parameter(torch.ones(length, dtype=torch.float32))
        name = str(config.non_linearity)
        self.bottleneck_activation[adapter_name] = ACT2FN["leaky_relu" if name == "leakyrelu" else name]
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.reset_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """Draw the projections' weights as `init_weights` says; biases start at 0.

        With `mam_adapter` the second projection is 0, so that the model starts as its base, exactly; He et al. 2022
        start so, after LoRA. With `bert` and `houlsby` (Houlsby et al. 2019) the output is small beside hidden states
        near 1 in a hidden space of hundreds of dimensions, but grows with both.
        """
        down: Any = self.bottleneck_down[adapter_name]
        up: Any = self.bottleneck_up[adapter_name]
        method = self.options[adapter_name].init_weights
        if method == "mam_adapter":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        else:
            for projection in (down, up):
                if method == "bert":
                    nn.init.normal_(projection.weight, std=0.02)
                else:
                    nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the base's module and the active adapters on its output (the first one, where there are several)."""
        output = self.base_layer(x, *args, **kwargs)
        residual = self.tap.take()
        active = [name for name in self.active_adapters if name in self.options]
        if self.disable_adapters or not active:
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        if residual is None:
            raise RuntimeError(f"{self.site.name} ran without {self.site.residual}, whose input its adapter needs")
        for name in active:
            hidden = self._adapt(name, hidden, residual)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def _adapt(self, name: str, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return h after the adapter `name`, in its own dtype."""
        options = self.options[name]
        dtype = self.bottleneck_up[name].weight.dtype
        carried = inner = hidden
        if options.is_parallel:
            inner = residual
        elif options.original_ln_before:
            norm = self._norm[0]
            added = hidden + residual
            inner = added if norm is None else norm(added)
            if options.residual_before_ln is not True:
                carried = added if options.residual_before_ln == "post_add" else inner
        change = self._bottleneck(name, self._cast_input_dtype(inner, dtype))
        carried = self._cast_input_dtype(carried, dtype)
        if options.ln_after:
            norm_after = self.bottleneck_norm_after[name]
            before = options.adapter_residual_before_ln and not options.is_parallel
            result = norm_after(change + carried) if before else norm_after(change) + carried
        else:
            result = change + carried
        if not options.original_ln_after:
            result = result - residual  # which the block is about to add
        return result.to(hidden.dtype)

    def _bottleneck(self, name: str, x: Tensor) -> Tensor:
        """Return f(x)."""
        if name in self.bottleneck_norm_before:
            x = self.bottleneck_norm_before[name](x)
        x = self.bottleneck_up[name](self.bottleneck_activation[name](self.bottleneck_down[name](x)))
        scaling: Any = self.options[name].scaling
        x = x * (self.bottleneck_scaling[name] if isinstance(scaling, str) else scaling)
        dropped: Tensor = self.bottleneck_dropout[name](x)
        return dropped

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is no weight that would do the same."""
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse: nothing was merged."""
        raise ValueError(MERGE_REFUSAL)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to where its block lies, in its own dtype; the wrapped module may have no weight at all."""
        weight = getattr(self.get_base_layer(), "weight", None)
        target = device or (weight.device if isinstance(weight, Tensor) else self._device)
        for attribute in self.adapter_layer_names:
            entries = getattr(self, attribute)
            if adapter_name in entries and not _on_meta(entries[adapter_name]):
                entries[adapter_name] = entries[adapter_name].to(target)


def _on_meta(entry: Any) -> bool:
    parameters = [entry] if isinstance(entry, Tensor) else list(entry.parameters())
    return any(parameter.is_meta for parameter in parameters)
