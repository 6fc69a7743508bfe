r"""The closed formula for the memory of a step, where a model cannot be run on the meta device.

For a decoder of N layers, T tokens and b bytes to a number, between forward and backward pass:

    activations = T N [ \sum_{linear} (b out + kept) + \sum_{norm} (2 \cdot 4 + b) H ]

where `kept` is `b in` for a linear layer that is trained itself, `4 (in + r)` for each active low-rank adapter of one
in float32, and nothing for a frozen one. With gradient checkpointing it is the input of every layer, `T N H b`, and the
activations of one layer. The loss holds two chunks of logits and the gradient of the hidden states; the backward pass
of the widest linear layer holds three tensors of its output's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.loss import LOGITS_BYTES
from ludwig_peft_plugin.estimate.batch import BatchShape

FLOAT = 4
"""Bytes of a float32."""


def formula_parts(llm: Any, shape: BatchShape) -> tuple[int, int, int]:
    """Return the bytes of activations, of the loss and of the backward pass's workspace.

    Args:
        llm: a `MetaLLM`.
        shape: the micro-batch.
    """
    base = unwrapped(llm.model)
    config = base.config.get_text_config()
    width, numbers = config.hidden_size, base.dtype.itemsize
    layers = _decoder_layers(base)
    per_layer = [_per_token(layer, numbers, width) for layer in layers]
    if llm.config_obj.trainer.enable_gradient_checkpointing:
        per_token = len(layers) * width * numbers + max(per_layer)
    else:
        per_token = sum(per_layer)
    vocabulary = config.vocab_size
    chunk = min(shape.targets * vocabulary * numbers, max(LOGITS_BYTES, 128 * vocabulary * numbers))
    widest = max((module.out_features for layer in layers for module in _linears(layer)), default=width)
    return shape.tokens * per_token, 2 * chunk + shape.targets * width * numbers, 3 * shape.tokens * widest * numbers


def _decoder_layers(base: nn.Module) -> list[nn.Module]:
    """Return the layers of the list of modules that holds the most, the whole model where it has no list."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return [base]
    largest = max(lists, key=lambda entries: len(list(entries.modules())))
    return [layer for layer in largest if isinstance(layer, nn.Module)]


def _linears(layer: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of the base in a decoder layer, without those that make up an adapter."""
    adapters = {id(part) for module in layer.modules() for part in _adapter_parts(module)}
    return [module for module in layer.modules() if isinstance(module, nn.Linear) and id(module) not in adapters]


def _adapter_parts(module: Any) -> list[nn.Module]:
    """Return the modules that an adapter has put beside the layer it is around."""
    if not hasattr(module, "get_base_layer"):
        return []
    base = {id(part) for part in module.get_base_layer().modules()}
    return [part for part in module.modules() if part is not module and id(part) not in base]


def _per_token(layer: nn.Module, numbers: int, width: int) -> int:
    """Return the bytes that a decoder layer keeps for each token."""
    total = 0
    for linear in _linears(layer):
        total += numbers * (linear.out_features + (linear.in_features if linear.weight.requires_grad else 0))
    modules: Iterator[Any] = layer.modules()
    for module in modules:
        if hasattr(module, "get_base_layer") and hasattr(module, "in_features"):
            ranks = getattr(module, "r", None)
            active = [int(ranks.get(name, 0)) for name in module.active_adapters] if isinstance(ranks, dict) else [0]
            total += sum(FLOAT * (int(module.in_features) + rank) for rank in active)
        elif "norm" in type(module).__name__.lower():
            total += (2 * FLOAT + numbers) * width
    return total
