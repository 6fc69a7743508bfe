r"""A module of the base that runs with trained copies of some of its parameters.

    y = f(x; \theta'),     \theta' = round(\phi) for the trained parameters,  \theta' = \theta for the rest

The copies \phi are float32 and are rounded to the number format of their originals in every forward pass, so that an
untrained copy gives the base's numbers exactly, and a trained one those of the merged model. A bias that the base does
not have, or one of a quantised layer, is added to the output: y = f(x; \theta) + (b' - b).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from ludwig_peft_plugin.model.dequantize import dequantizer_of


class SelectiveLayer(nn.Module, BaseTunerLayer):
    """Wraps a module; the attribute named by `container` holds the trained copies, by adapter and parameter name.

    Only one adapter can be active in it: two values of one weight cannot be used at once.
    """

    container: ClassVar[str]
    adapter_layer_names: tuple[str, ...]
    base_layer: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (cls.container,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.container, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._originals: dict[str, nn.Parameter | None] = {}
        # bitsandbytes' backward pass gives the gradient of a bias for rows of two dimensions alone.
        self._is_quantized = dequantizer_of(base_layer) is not None

    @property
    def copies(self) -> nn.ModuleDict:
        """The trained copies of each adapter."""
        copies: nn.ModuleDict = getattr(self, self.container)
        return copies

    def update_layer(self, adapter: str, names: list[str], shared: dict[int, nn.Parameter], inference: bool) -> None:
        """Add an adapter, whose copies equal their originals.

        Args:
            adapter: its name.
            names: of the module's own parameters to copy; `bias` of a linear layer without one makes one of zeros.
            shared: copies made so far by the identity of their originals: tied weights have one copy.
            inference: whether the copies are frozen.
        """
        copies = nn.ParameterDict()
        for name in names:
            original = self.base_layer._parameters.get(name)
            if original is None:
                copies[name] = nn.Parameter(self._zero_bias())
                continue
            if id(original) not in shared:
                wide = torch.promote_types(original.dtype, torch.float32)
                shared[id(original)] = nn.Parameter(original.detach().to(wide, copy=True))
            copies[name] = shared[id(original)]
        self.copies[adapter] = copies
        tuner: Any = self
        tuner.set_adapter(tuner.active_adapters, inference_mode=inference)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapter's copies."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        copies = None if self.disable_adapters or self.merged else self._active_copies()
        if copies is None:
            return self.base_layer(*args, **kwargs)
        replaced: dict[str, Tensor] = {}
        added: Tensor | None = None
        for name, copy in copies.items():
            original = self.base_layer._parameters.get(name)
            if original is None:
                added = copy
            elif self._is_quantized:
                added = copy - original
            else:
                replaced[name] = copy.to(original.dtype)
        output: Any
        if replaced:
            output = functional_call(self.base_layer, replaced, args, kwargs, tie_weights=False)
        else:
            output = self.base_layer(*args, **kwargs)
        return output if added is None else output + added.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the copies of an adapter into the base, rounded to its number format.

        Raises:
            ValueError: two adapters train the same weights, or (`safe_merge`) a number is not finite.
        """
        here = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.copies]
        if len(here) + len(self.merged_adapters) > 1:
            names = ", ".join(self.merged_adapters + here)
            raise ValueError(f"the adapters {names} train the same weights; merge one of them.")
        for adapter in here:
            for name, copy in self._copies_of(adapter).items():
                if safe_merge and not torch.isfinite(copy).all():
                    raise ValueError(f"{name} of adapter {adapter!r} is not finite.")
                original = self.base_layer._parameters.get(name)
                dtype = self._compute_dtype() if original is None else original.dtype
                self._originals[name] = original
                # A new parameter: one that is tied to the original elsewhere has a copy, and a merge, of its own.
                merged = nn.Parameter(copy.detach().to(dtype, copy=True), requires_grad=False)
                setattr(self.base_layer, name, merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the base its own weights back."""
        for name, original in self._originals.items():
            setattr(self.base_layer, name, original)
        self._originals.clear()
        self.merged_adapters.clear()

    def _copies_of(self, adapter: str) -> nn.ParameterDict:
        copies = self.copies[adapter]
        assert isinstance(copies, nn.ParameterDict)
        return copies

    def _active_copies(self) -> nn.ParameterDict | None:
        tuner: Any = self
        here = [name for name in tuner.active_adapters if name in self.copies]
        if len(here) > 1:
            raise ValueError(f"the adapters {', '.join(here)} train the same weights; only one of them can be active.")
        return self._copies_of(here[0]) if here else None

    def _zero_bias(self) -> Tensor:
        linear: Any = self.base_layer
        return torch.zeros(linear.out_features, dtype=torch.float32, device=linear.weight.device)

    def _compute_dtype(self) -> torch.dtype:
        """Return the dtype of a bias the base does not have: that of the weight, or of the computation with it."""
        linear: Any = self.base_layer
        dtype: torch.dtype | None = getattr(linear, "compute_dtype", None)
        if dtype is None:
            dtype = torch.float32 if self._is_quantized else linear.weight.dtype
        return dtype


class BitFitLayer(SelectiveLayer):
    """A module with trained biases."""

    container = "bitfit_copies"


class SelectedLayer(SelectiveLayer):
    """A module with trained weights."""

    container = "selected_layers_copies"


class NormLayer(SelectiveLayer):
    """A normalisation with trained weights; its names in a saved adapter are those of PEFT's LN tuning."""

    container = "ln_tuning_layers"
