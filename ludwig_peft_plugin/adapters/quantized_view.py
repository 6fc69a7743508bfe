"""A quantised layer as a plain one: PEFT's layers read its weight in numbers and multiply through it as it is.

PEFT has layers for quantised bases in a few of its methods only; the others would read packed bytes for weights. Behind
this view every method works on every quantised base the plugin loads, with one piece of code to test: what calls the
base layer runs the quantised product, and what needs the weight itself gets it dequantised, anew each time, so that
nothing but the quantised weight stays in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.model.dequantize import Dequantizer, dequantizer_of, register_dequantizer, unquantized_dtype


class PlainView(nn.Linear):
    """A quantised linear layer that looks like `nn.Linear`.

    Attributes:
        quantized: the layer itself, which still multiplies.
        weight: shape (out, in), dequantised at each access, in the dtype of the model's unquantised parameters. It can
            be read and not changed.
        bias: the layer's own.
    """

    quantized: Any

    def __init__(self, quantized: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self.dtype = dtype
        self.source_cls = getattr(quantized, "source_cls", nn.Linear)
        self.quantized = quantized
        bias = quantized._parameters.pop("bias")
        # The layer finds it as before; as a parameter it is listed once, under the name it has in a plain layer.
        quantized.__dict__["bias"] = bias
        self.register_parameter("bias", bias)
        self.train(quantized.training)

    @property
    def weight(self) -> Tensor:
        """The numbers that the forward pass multiplies with."""
        return _numbers(self).to(self.dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT hands a layer its own weight when it takes an adapter off. Other numbers have no place here.
        if not torch.equal(value, self.weight):
            raise AttributeError("The weight of a quantised layer cannot be replaced through the view on it.")

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (..., out), as the quantised layer computes it."""
        y: Tensor = self.quantized(x)
        # PEFT's layers add to the product in place, which autograd refuses for a view made in a custom function.
        return y.clone() if torch.is_grad_enabled() and y._is_view() else y

    def release(self) -> Any:
        """Return the quantised layer as it was before."""
        del self.quantized.__dict__["bias"]
        self.quantized.register_parameter("bias", self.bias)
        return self.quantized


def view_quantized(base: nn.Module, config: Any) -> None:
    """Put views in the place of the quantised layers of `base` that a PEFT config targets."""
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists

    targets, dtype = config.target_modules, unquantized_dtype(base)
    everything = targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")
    for name, module in list(base.named_modules()):
        parent = base.get_submodule(name.rpartition(".")[0]) if name else None
        if parent is None or isinstance(parent, PlainView | BaseTunerLayer):
            continue
        if isinstance(module, PlainView) or dequantizer_of(module) is None:
            continue
        if everything or check_target_module_exists(config, name):
            setattr(parent, name.rpartition(".")[2], PlainView(module, dtype))


def remove_views(base: nn.Module) -> None:
    """Put the quantised layers of `base` back where no adapter stands on a view any more."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(base.modules()):
        if not isinstance(parent, BaseTunerLayer):
            for name, child in list(parent.named_children()):
                if isinstance(child, PlainView):
                    setattr(parent, name, child.release())


def refuse_merging(model: nn.Module) -> None:
    """Have adapter layers that stand on a view say why they cannot be merged in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AdapterError(
            "An adapter cannot be merged into a quantised layer in place: the weights' grid is coarser than the "
            "adapter's change. Use ludwig_peft_plugin.export.merge.merged_copy, or export: [{format: merged}]."
        )

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PlainView):
            module.merge = refuse


def _numbers(view: PlainView) -> Tensor:
    """Return the dequantised weight, shape (out, in), as the layer's kind gives it."""
    dequantizer = dequantizer_of(view.quantized)
    assert dequantizer is not None
    return dequantizer.weight(view.quantized).detach()


register_dequantizer(Dequantizer(name="view", matches=lambda layer: isinstance(layer, PlainView), weight=_numbers))
