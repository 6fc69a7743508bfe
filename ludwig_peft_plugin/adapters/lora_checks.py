"""Whether the options of a LoRA adapter can take effect on a given base: what cannot is an error that says why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ludwig_peft_plugin.adapters.peft_build import is_quantized
from ludwig_peft_plugin.adapters.targets import LINEAR, Targets, ends_in, matches_pattern, suggestion
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.adapters.lora_options import LoraOptions


def check_options(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check every option that PEFT would ignore, or fail on late, on this base.

    Raises:
        AdapterError: an option cannot take effect.
    """
    for check in (
        _check_patterns,
        _check_init,
        _check_loftq,
        check_modules_to_save,
        _check_tokens,
        _check_parameters,
        _check_bias,
        _check_replication,
        _check_offload,
    ):
        check(base, adapter, targets)


def merge_obstacle(base: PreTrainedModel, adapter: LoraOptions) -> str | None:
    """Return why the adapter could not be merged into `base`, None if it can."""
    if adapter.layer_replication:
        return "adapter.layer_replication: replicated layers share their weights, so their adapters cannot be merged."
    if adapter.lora_bias:
        from ludwig_peft_plugin.adapters.targets import find_targets

        for name in find_targets(base, adapter).names:
            if getattr(base.get_submodule(name), "bias", None) is None:
                return f"adapter.lora_bias: {name} has no bias into which that of the adapter could be merged."
    return None


def _check_init(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that the initialisation works with this base and every target."""
    method, name = adapter.init, adapter.init_lora_weights
    quantized = is_quantized(base)
    if quantized and not method.quantized:
        raise AdapterError(
            f"adapter.init_lora_weights: {name} reads the base's weights in full precision, and this one is quantised. "
            "Use default, gaussian, eva or loftq, or a base without quantization."
        )
    if not quantized and method.quantized == "only":
        raise AdapterError(
            f"adapter.init_lora_weights: {name} makes up for the error of a quantised base, and this one is not "
            "quantised. Add quantization: {bits: 4} (adapter: {type: qlora} brings it), or use default or pissa."
        )
    ranks = adapter.rank_pattern or {}
    tied = _shared_weights(base)
    for target in targets.names:
        module = base.get_submodule(target)
        if method.layers_only and not isinstance(module, LINEAR):
            raise AdapterError(
                f"adapter.init_lora_weights: {name} is for linear layers, and {target!r} is a {type(module).__name__}. "
                "Leave it out of target_modules, or use init_lora_weights: default."
            )
        if not method.conv1d and isinstance(module, Conv1D):
            raise AdapterError(
                f"adapter.init_lora_weights: {name} does not work with the Conv1D layers of this architecture "
                f"({target!r}); use pissa or default."
            )
        if method.changes_base and id(getattr(module, "weight", None)) in tied:
            raise AdapterError(
                f"adapter.init_lora_weights: {name} changes the base's weights, and those of {target!r} are shared "
                "with another module. Leave it out of target_modules, or use init_lora_weights: default."
            )
        rank = next((value for key, value in ranks.items() if matches_pattern(target, key)), adapter.r)
        shape = (module.in_features, module.out_features) if hasattr(module, "in_features") else module.weight.shape
        side = min(shape)
        if method.ranks * rank > side:
            raise AdapterError(
                f"adapter.init_lora_weights: {name} with rank {rank} needs {method.ranks * rank} singular values, and "
                f"{target!r} has {side}; lower r, or give it a rank of its own in rank_pattern."
            )


def _check_loftq(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that LoftQ is asked for the kind of quantisation the base has."""
    if adapter.init_lora_weights != "loftq":
        return
    bits = 4 if getattr(base, "is_loaded_in_4bit", False) else 8 if getattr(base, "is_loaded_in_8bit", False) else None
    asked = adapter.loftq_config.loftq_bits if adapter.loftq_config else None
    if bits is None:
        raise AdapterError("adapter.init_lora_weights: loftq needs a base quantised with backend: bitsandbytes.")
    if asked not in (None, bits):
        raise AdapterError(
            f"adapter.loftq_config.loftq_bits: {asked}, but the base is quantised to {bits} bits; make the two agree, "
            "or leave loftq_bits out."
        )


def _check_patterns(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that each key of `rank_pattern` and `alpha_pattern` matches an adapted module."""
    adapted = [*targets.names, *_named_parameters(base, adapter.target_parameters or [])]
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(adapter, option) or {}:
            try:
                found = any(matches_pattern(name, key) for name in adapted)
            except re.error as error:
                raise AdapterError(f"adapter.{option}: {key!r} is not a regular expression: {error}.") from error
            if not found:
                raise AdapterError(
                    f"adapter.{option}: {key!r} matches no module that gets an adapter. {suggestion(base, [key])}"
                )


def check_modules_to_save(base: PreTrainedModel, adapter: Any, targets: Targets) -> None:
    """Check that each entry of `modules_to_save` is a module, and one that can be trained."""
    for entry in adapter.modules_to_save or []:
        found = [module for name, module in base.named_modules(remove_duplicate=False) if ends_in(name, entry)]
        if not found:
            children = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in base.named_modules() if name}))
            raise AdapterError(f"adapter.modules_to_save: no module is called {entry!r}. The model has {children}.")
        for module in found:
            if any(parameter.element_size() == 1 for parameter in module.parameters()):
                raise AdapterError(
                    f"adapter.modules_to_save: {entry!r} is quantised, so it cannot be trained in full. Adapt it with "
                    "target_modules, or use a base without quantization."
                )


def _check_tokens(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that `trainable_token_indices` names embeddings, and tokens they have."""
    tokens = adapter.trainable_token_indices
    if tokens is None:
        return
    embeddings = {name: module for name, module in base.named_modules() if isinstance(module, nn.Embedding)}
    head = base.get_input_embeddings()
    wanted: dict[str, list[int]] = tokens if isinstance(tokens, dict) else {"": tokens}
    for entry, ids in wanted.items():
        found = {name: m for name, m in embeddings.items() if (ends_in(name, entry) if entry else m is head)}
        if not found:
            raise AdapterError(
                f"adapter.trainable_token_indices: no embedding is called {entry!r}. The model has "
                f"{', '.join(name.rsplit('.', 1)[-1] for name in embeddings)}."
            )
        if any(ends_in(name, whole) for name in found for whole in adapter.modules_to_save or []):
            raise AdapterError(
                "adapter.trainable_token_indices has no effect on an embedding that modules_to_save trains in full "
                f"({', '.join(found)}); remove one of the two."
            )
        size = min(int(module.weight.shape[0]) for module in found.values())
        if max(ids) >= size:
            raise AdapterError(
                f"adapter.trainable_token_indices: token {max(ids)} does not exist, the vocabulary has {size} tokens "
                f"(0 to {size - 1})."
            )


def _check_parameters(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that each entry of `target_parameters` is a parameter that is not quantised."""
    for entry in adapter.target_parameters or []:
        found = _named_parameters(base, [entry])
        if not found:
            raise AdapterError(
                f"adapter.target_parameters: no parameter is called {entry!r}; give the end of its full name, as in "
                f"{next(name for name, _ in base.named_parameters())!r}."
            )
        if any(base.get_parameter(name).element_size() == 1 for name in found):
            raise AdapterError(
                f"adapter.target_parameters: {entry!r} is quantised; adapt its module with target_modules instead."
            )


def _check_bias(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that there are biases to train."""
    if adapter.bias_type == "none":
        return
    everywhere = adapter.bias_type == "all"
    modules: Any = base.modules() if everywhere else [base.get_submodule(name) for name in targets.names]
    if all(getattr(module, "bias", None) is None for module in modules):
        raise AdapterError(
            f"adapter.bias_type: {adapter.bias_type} has nothing to train, because "
            f"{'this model has' if everywhere else 'the adapted modules have'} no bias; use none."
        )


def _check_replication(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that `layer_replication` names layers the model has."""
    count = base.config.get_text_config().num_hidden_layers
    for first, end in adapter.layer_replication or []:
        if end > count:
            raise AdapterError(
                f"adapter.layer_replication: [{first}, {end}] goes past the last layer; the model has {count} layers, "
                f"so the second number is at most {count}."
            )


def _check_offload(base: PreTrainedModel, adapter: LoraOptions, targets: Targets) -> None:
    """Check that there is a GPU to compute on."""
    import torch

    if getattr(adapter, "ephemeral_gpu_offload", False) and not torch.cuda.is_available():
        raise AdapterError("adapter.ephemeral_gpu_offload: true needs a GPU, and none is found; leave it out.")


def _named_parameters(base: nn.Module, entries: list[str]) -> list[str]:
    """Return the full names of the parameters that `entries` match."""
    return [name for name, _ in base.named_parameters() if any(ends_in(name, entry) for entry in entries)]


def _shared_weights(base: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one module holds."""
    seen: dict[int, int] = {}
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}
