"""A decoder layer of transformers whose forward pass runs through the fused blocks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ludwig_peft_plugin.engine.attention import rotated_attention, takes_short_kernel, varlen_attention
from ludwig_peft_plugin.engine.frozen import frozen_linear
from ludwig_peft_plugin.engine.fused.blocks import (
    AttentionInput,
    FeedForward,
    GatedFeedForward,
    Norm,
    OutputProjection,
    QueryKeyValue,
)
from ludwig_peft_plugin.engine.fused.group import Adapter, LinearGroup, Member, refresh
from ludwig_peft_plugin.engine.fused.rows import select_rows
from ludwig_peft_plugin.engine.replay import recomputed_layer

LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
"""transformers' decoder layers that compute exactly what blocks.py says."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class CannotFuse(Exception):
    """Why a decoder layer runs as transformers wrote it."""


@dataclass
class _Parts:
    attention: AttentionInput
    output: LinearGroup
    feed_forward: FeedForward
    signature: tuple[Any, ...]

    @property
    def groups(self) -> list[LinearGroup]:
        return [self.attention.group, self.output, self.feed_forward.gate_up, self.feed_forward.down]


class FusedForward:
    """Stands for the `forward` of one decoder layer; hands over to the layer's own where it must.

    An instance, not a closure, so that a deep copy of the model gets forwards of its own layers.
    """

    def __init__(self, layer: nn.Module, index: int, *, last: bool = False) -> None:
        self.layer = layer
        self.index = index
        self.last = last
        self._parts: _Parts | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, output_rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: shape (1, T, H) for a flat row, else (B, L, H).
            args: what transformers passes on.
            output_rows: places in the flat row, (M,), each once; the last layer returns these alone, (1, M, H).
            kwargs: what transformers passes on.
        """
        rows = output_rows if self.last else None
        boundaries: Tensor | None = kwargs.get("cu_seq_lens_q")
        parts = None
        if boundaries is not None and not args and kwargs.get("past_key_values") is None:
            with suppress(CannotFuse):
                parts = self._current_parts(hidden_states.dtype)
        if parts is None or boundaries is None:
            states: Tensor = type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
            return states if rows is None else states[:, rows]
        attention: Any = self.layer.self_attn
        training = self.layer.training
        cos, sin = (angles[0] for angles in kwargs["position_embeddings"])
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        group = parts.attention.group
        window, longest, size = _window(attention), kwargs["max_length_q"], parts.attention.head_size
        if takes_short_kernel(x, size, boundaries, longest, window):  # which rotates queries and keys itself
            q, k, v, x = QueryKeyValue.apply(x, None, None, parts.attention, training, *group.parameters)
            mixed = rotated_attention(q, k, v, (cos, sin), boundaries, attention.scaling)
        else:
            q, k, v, x = QueryKeyValue.apply(x, cos, sin, parts.attention, training, *group.parameters)
            mixed = varlen_attention(q, k, v, boundaries, longest, attention.scaling, window)
        mixed = mixed.flatten(1)
        if rows is not None:
            mixed, x = select_rows(mixed, rows), select_rows(x, rows)
        x = OutputProjection.apply(mixed, x, parts.output, training, *parts.output.parameters)
        block = parts.feed_forward
        read = recomputed_layer() is not self.layer  # a layer that is run again for its gradients needs no output
        x = GatedFeedForward.apply(x, block, training, read, *block.gate_up.parameters, *block.down.parameters)
        return x[None] if rows is not None else x.view_as(hidden_states)

    def signature(self) -> tuple[Any, ...]:
        """Return what tells one state of the layer's adapters from another."""
        return _signature(self.layer, None)

    @property
    def memory(self) -> object:
        """What holds the memory that passes through the layer read and write: another object when it was made anew."""
        return self._parts

    def groups(self, dtype: torch.dtype) -> list[LinearGroup]:
        """Return the layer's linear layers, by common input; none where the layer cannot be fused."""
        try:
            return self._current_parts(dtype).groups
        except CannotFuse:
            return []

    def adapter_fields(self, dtype: torch.dtype) -> list[tuple[Adapter, str]]:
        """Return where the fused blocks read the layer's trained parameters: an adapter and the name of its field."""
        adapters = [adapter for group in self.groups(dtype) for adapter in group.adapters]
        names = ("a", "b", "magnitude")
        return [(adapter, name) for adapter in adapters for name in names if getattr(adapter, name) is not None]

    def _current_parts(self, dtype: torch.dtype) -> _Parts:
        """Return the layer's parts, found anew when its modules or its adapter's state have changed."""
        signature = _signature(self.layer, dtype)
        if self._parts is None or self._parts.signature != signature:
            self._parts = _parts(self.layer, dtype, signature, self.index)
            for group in self._parts.groups:
                group.allocate(dtype)
            refresh(self._parts.groups)
        return self._parts


def obstacle(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Return why `layer` cannot be fused for activations of `dtype`, None when it can."""
    try:
        _parts(layer, dtype, ())
    except CannotFuse as reason:
        return str(reason)
    return None


def _linears(layer: Any) -> list[Any]:
    """Return the layer's linear layers, None for those that something else stands for."""
    attention = [getattr(layer.self_attn, name, None) for name in ATTENTION]
    return attention + [getattr(layer.mlp, name, None) for name in FEED_FORWARD]


def _signature(layer: Any, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Return what, when it changes, makes parts found before wrong."""
    found: list[Any] = [dtype, torch.is_autocast_enabled("cuda")]
    for part in (*_linears(layer), layer.input_layernorm, layer.post_attention_layernorm):
        found += [id(part), *_places(part)]
        if hasattr(part, "active_adapters"):
            found += [part.disable_adapters, bool(part.merged_adapters), tuple(part.active_adapters)]
        elif part is not None:
            found += [parameter is not None and parameter.requires_grad for parameter in part._parameters.values()]
    return tuple(found)


def _places(linear: Any) -> list[int]:
    """Return where the weights of a layer, without its adapters, lie: merging may put others in their place."""
    base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    found = [] if base is None else base._parameters.values()
    return [weight.data_ptr() for weight in found if weight is not None and not is_traceable_wrapper_subclass(weight)]


def _parts(layer: Any, dtype: torch.dtype, signature: tuple[Any, ...], index: int = 0) -> _Parts:
    if type(layer).__name__ not in LAYERS:
        raise CannotFuse(f"{type(layer).__name__} is not one of {', '.join(sorted(LAYERS))}")
    if torch.is_autocast_enabled("cuda"):
        raise CannotFuse("mixed precision chooses the dtype of each operation")
    linears = _linears(layer)
    if None in linears:
        raise CannotFuse(f"{type(layer.self_attn).__name__} and {type(layer.mlp).__name__} are not the layer's own")
    if layer.mlp.config.hidden_act != "silu":
        raise CannotFuse(f"the activation is {layer.mlp.config.hidden_act}")
    members = [_member(linear, dtype) for linear in linears]
    q, k, v, o, gate, up, down = members
    trained = {id(parameter) for group in members for parameter in LinearGroup([group]).parameters}
    if any(parameter.requires_grad and id(parameter) not in trained for parameter in layer.parameters()):
        raise CannotFuse("more than LoRA's weights is trained in it")
    stream = index * len(members)  # every adapter has a dropout mask of its own
    attention = AttentionInput(_norm(layer.input_layernorm), LinearGroup([q, k, v], stream), layer.self_attn.head_dim)
    block = FeedForward(
        _norm(layer.post_attention_layernorm), LinearGroup([gate, up], stream + 4), LinearGroup([down], stream + 6)
    )
    output = LinearGroup([o], stream + 3)
    return _Parts(attention, output, block, signature)


def _window(attention: Any) -> int | None:
    """Return the sliding window of a layer's attention: Qwen's layers hold their own, Mistral's config has one."""
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window


def _norm(norm: Any) -> Norm:
    if not hasattr(norm, "variance_epsilon"):
        raise CannotFuse(f"{type(norm).__name__} is not a plain RMSNorm")
    return Norm(norm.weight, norm.variance_epsilon)


def _member(linear: Any, dtype: torch.dtype) -> Member:
    """Return a linear layer, or one that PEFT has put a LoRA around, as a group's member."""
    base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    frozen = frozen_linear(base, dtype)
    if isinstance(frozen, str):
        raise CannotFuse(frozen)
    if base is linear or linear.disable_adapters:
        return Member(frozen, None)
    return Member(frozen, _adapter(linear))


def _adapter(linear: Any) -> Adapter:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    # Other methods build on LoRA's layers (AdaLoRA) and compute something else.
    if not isinstance(linear, LoraLayer) or not type(linear).__module__.startswith("peft.tuners.lora."):
        raise CannotFuse(f"{type(linear).__name__} adapters")
    if linear.merged_adapters or len(linear.active_adapters) != 1:
        raise CannotFuse("not exactly one LoRA is active")
    name = linear.active_adapters[0]
    if name not in linear.lora_A:
        raise CannotFuse(f"the LoRA {name!r} leaves some layers out")
    variant = linear.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        raise CannotFuse(f"LoRA variant {type(variant).__name__}")
    down: Any = linear.lora_A[name]
    up: Any = linear.lora_B[name]
    plain = type(down) is nn.Linear and type(up) is nn.Linear
    if not plain or up.bias is not None or linear.fan_in_fan_out:
        raise CannotFuse("LoRA with biases or of another shape")
    rate = float(getattr(linear.lora_dropout[name], "p", 0.0))
    if variant is not None and rate:
        raise CannotFuse("DoRA with dropout")
    magnitude = linear.lora_magnitude_vector[name].weight if variant is not None else None
    return Adapter(down.weight, up.weight, float(linear.scaling[name]), rate, magnitude)
