"""Build a plain `transformers` model with the adapter merged in, beside the trained model, which is left as it is.

The copy is made on the CPU in the dtype it will be stored in, so it costs one model of that dtype in main memory and no
accelerator memory beyond one layer. Each adapted layer is merged in float32, from the weight that the trained model's
forward multiplies with (dequantised when it is quantised), and rounded once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ludwig_peft_plugin.adapters.quantized_view import PlainView
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.model.dequantize import plain_parameters

CPU = torch.device("cpu")


@dataclass
class Rounding:
    """How much of the adapter's change of the weights is left after rounding them to the stored dtype.

    A change smaller than the distance of two neighbouring numbers of the dtype is rounded away: beside a bfloat16
    weight that is a change of less than about 1/512 of the weight.
    """

    lost: float = 0.0
    total: float = 0.0

    def add(self, before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in a weight before the merge, merged in float32, and merged and rounded."""
        change = (exact - before).double()
        self.lost += float(((exact - rounded.float()).double() * change).sum())
        self.total += float(change.square().sum())

    @property
    def kept(self) -> float | None:
        """The share of the change that is left, 1.0 for all of it; None when nothing was changed."""
        return 1.0 - self.lost / self.total if self.total else None


def merged_copy(
    model: PreTrainedModel | PeftModel, dtype: torch.dtype, rounding: Rounding | None = None
) -> PreTrainedModel:
    """Return a plain model on the CPU with the weights of `model` and its active adapters, all in `dtype`.

    `model` is not changed. Without an adapter this is a (dequantised) copy. `rounding` takes in what the dtype costs.

    Raises:
        ExportError: the adapter cannot be expressed in the base's weights, or a merged weight is not finite in `dtype`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_mergeable(model)
    merged = plain_copy(base, dtype)
    if isinstance(model, PeftModel):
        with torch.random.fork_rng(devices=[]):  # PEFT draws initial weights, which are overwritten
            merged = _merge_adapters(model, merged, dtype, rounding or Rounding())
    _settle_tied_embeddings(merged)
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ExportError(f"export: {name} is not finite in {dtype}; use dtype: float32 or bfloat16.")
    return merged.eval()


def plain_copy(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model under an adapter as a plain model on the CPU: dequantised, without the adapter.

    The model is built anew from its config, so nothing that was patched into the live one (hooks, compiled or fused
    forwards) comes along. Tied embeddings are separate in the copy.
    """
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        plain: PreTrainedModel = type(base)._from_config(config, dtype=dtype)
    persistent = plain.state_dict().keys()
    for name, module in _modules_under_adapter(base):
        target = plain.get_submodule(name)
        for parameter_name, tensor in plain_parameters(module).items():
            if target._parameters.get(parameter_name) is None:
                raise ExportError(f"export: {type(base).__name__} has no parameter {name}.{parameter_name} to export.")
            setattr(target, parameter_name, nn.Parameter(_on_cpu(tensor, dtype), requires_grad=False))
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if f"{name}.{buffer_name}".lstrip(".") in persistent:
                setattr(target, buffer_name, buffer.detach().to(CPU, copy=True))
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain


def _on_cpu(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy of a tensor on the CPU, in `dtype` when it is floating point."""
    return tensor.detach().to(CPU, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _modules_under_adapter(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules by the names they have in the plain model, stepping over what PEFT wrapped around."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield name, module
    if isinstance(module, PlainView):
        return  # stands for the quantised layer behind it
    for child_name, child in module.named_children():
        yield from _modules_under_adapter(child, f"{name}.{child_name}".lstrip("."))


def _merge_adapters(
    model: PeftModel, plain: PreTrainedModel, dtype: torch.dtype, rounding: Rounding
) -> PreTrainedModel:
    """Attach the active adapters of `model` to `plain` with their present weights, and merge them."""
    base_tensors = {id(tensor) for tensor in (*plain.parameters(), *plain.buffers())}
    attached = _attach(model, plain)
    live_tensors = dict(_named_tensors(model))
    for name, tensor in _named_tensors(attached):
        if id(tensor) not in base_tensors:
            if name not in live_tensors:
                raise ExportError(f"export: the adapter cannot be merged: the trained model has no tensor {name}.")
            tensor.data = _on_cpu(live_tensors[name], torch.float32)
    live_modules = dict(model.named_modules())
    for base_layer, layers in _adapted_layers(attached).items():
        live_base = live_modules[layers[0][0]].get_base_layer()
        # New parameters, not new data: a weight tied to this one (the output embedding) has to keep its value.
        before = {name: _on_cpu(weight, torch.float32) for name, weight in plain_parameters(live_base).items()}
        for name, weight in before.items():
            setattr(base_layer, name, nn.Parameter(weight.clone(), requires_grad=False))
        for name, layer in layers:
            if live_modules[name].merged:
                raise ExportError("export: the adapter is merged into the live model; call unmerge_adapter() first.")
            _merge_layer(name, layer, list(model.active_adapters))
        for name, weight in before.items():
            parameter = base_layer.get_parameter(name)
            exact, parameter.data = parameter.data, parameter.data.to(dtype)
            rounding.add(weight, exact, parameter.data)
    merged: PreTrainedModel = attached.base_model.unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return merged


def _check_mergeable(model: PreTrainedModel | PeftModel) -> None:
    """Raise if an active adapter adds inputs to the model."""
    for name in model.active_adapters if isinstance(model, PeftModel) else ():
        config = model.peft_config[name]
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ExportError(
                f"export: format merged is impossible for the adapter type {config.peft_type.value.lower()}: it "
                "adds inputs to the model instead of changing its weights. Use format: adapter."
            )


def _attach(model: PeftModel, plain: PreTrainedModel) -> PeftModel:
    """Return `plain` with adapters shaped as the active ones of `model`; their weights are still arbitrary."""
    attached: PeftModel | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT said it all when the trained model was built
        for name in model.active_adapters:
            config = _shape_only(model.peft_config[name])
            if attached is None:
                attached = PeftModel(plain, config, adapter_name=name)
            else:
                attached.add_adapter(name, config)
        if attached is None:
            raise ExportError("export: the model has no active adapter to merge.")
        attached.base_model.set_adapter(list(model.active_adapters))
    return attached


def _shape_only(config: PeftConfig) -> PeftConfig:
    """Return a copy of an adapter's config without what acts on the base: the live base has been through it already."""
    config = copy.deepcopy(config)
    neutral: dict[str, Any] = {"loftq_config": {}, "eva_config": None, "corda_config": None, "layer_replication": None}
    if isinstance(getattr(config, "init_lora_weights", None), str):
        neutral["init_lora_weights"] = True
    for name, value in neutral.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.inference_mode = True
    return config


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers by name, shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _adapted_layers(model: nn.Module) -> dict[nn.Module, list[tuple[str, Any]]]:
    """Return every adapted base layer with the adapter layers around it (more than one when they are nested)."""
    layers: dict[nn.Module, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault(module.get_base_layer(), []).append((name, module))
    return layers


def _merge_layer(name: str, layer: Any, adapters: list[str]) -> None:
    """Merge the active adapters of one layer into its base layer, in float32."""
    try:
        layer.merge(safe_merge=True, adapter_names=adapters)
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"export: format merged: the adapter at {name} cannot be merged: {reason}\nUse format: adapter."
        ) from error


def _settle_tied_embeddings(model: PreTrainedModel) -> None:
    """Tie the embeddings again when the config says so and they are still equal, else have the config untie them.

    They differ when an adapter changed one of the two: merging into a tied weight would change the other as well.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or torch.equal(embedding.weight, head.weight):
        model.tie_weights()
        return
    for config in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
