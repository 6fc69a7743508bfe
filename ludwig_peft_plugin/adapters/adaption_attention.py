"""PEFT's attention of an adaption prompt (LLaMA-Adapter) with weights in float32, over a base of any precision.

PEFT makes prompt and gate in the dtype of the base's query weights, where small steps are lost in 16 bits, and
multiplies them with whatever the layers give. Here they are float32 and take the activations' dtype in each pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.adaption_prompt import model as model_module
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT, _BaseAdaptedAttention
from torch import Tensor, nn


class _Gated:
    """Adds gated attention over the prompt to the layer's own, before the output projection."""

    model: Any
    model_type: str
    adapter_len: int
    adaption_prompt: nn.Parameter
    adaption_gate: nn.Parameter

    def _over_prompt(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return `g softmax(q k^T / sqrt(d)) v`, shape (B, L, heads d).

        Args:
            queries: shape (B, heads, L, d).
            keys: of the prompt, shape (1, P, kv_heads d).
            values: of the prompt, shape (1, P, kv_heads d).
        """
        size, heads = queries.shape[-1], queries.shape[1]

        def by_head(states: Tensor) -> Tensor:
            split = states.view(1, self.adapter_len, -1, size).transpose(1, 2).to(queries.dtype)
            return split.repeat_interleave(heads // split.shape[1], dim=1)  # (1, heads, P, d)

        scores = queries @ by_head(keys).transpose(2, 3) / math.sqrt(size)
        chances = self.adaption_gate.float() * F.softmax(scores, dim=-1, dtype=torch.float32)
        return (chances.to(queries.dtype) @ by_head(values)).transpose(1, 2).flatten(2)


class GatedAttention(_Gated, AdaptedAttention):
    """Around an attention with projections q, k, v and o (Llama, Mistral)."""

    def __init__(self, model_type: str, adapter_len: int, model: nn.Module) -> None:
        _BaseAdaptedAttention.__init__(self, model_type, adapter_len, model, target_dtype=torch.float32)

    def forward(self, **kwargs: Any) -> tuple[Any, ...]:
        """Return the attention's outputs, the first with the prompt's share."""
        output, *others = self.model(**kwargs)
        prompt = self.adaption_prompt.to(output.dtype)
        queries = TRANSFORMERS_MODEL_CONFIG[self.model_type].compute_query_states(model=self.model, **kwargs)
        over_prompt = self._over_prompt(queries, self.model.k_proj(prompt), self.model.v_proj(prompt))
        return output + self.model.o_proj(over_prompt), *others


class GatedAttentionGPT(_Gated, AdaptedAttentionGPT):
    """Around GPT-2's attention, with one projection for q, k and v. As in PEFT, the share is not projected."""

    def __init__(self, model_type: str, adapter_len: int, model: nn.Module) -> None:
        _BaseAdaptedAttention.__init__(self, model_type, adapter_len, model, target_dtype=torch.float32)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the attention's outputs, the first with the prompt's share."""
        output, *others = self.model(hidden_states, *args, **kwargs)
        queries = TRANSFORMERS_MODEL_CONFIG[self.model_type].compute_query_states(
            self.model, hidden_states=hidden_states
        )
        _, keys, values = self.model.c_attn(self.adaption_prompt.to(output.dtype)).chunk(3, dim=-1)
        return output + self._over_prompt(queries, keys, values), *others


@contextmanager
def prompts_in_float32() -> Iterator[None]:
    """Let PEFT put these attentions into a model, in place of its own, as long as the context lasts."""
    names = {"AdaptedAttention": GatedAttention, "AdaptedAttentionGPT": GatedAttentionGPT}
    before = {name: getattr(model_module, name) for name in names}
    for name, cls in names.items():
        setattr(model_module, name, cls)
    try:
        yield
    finally:
        for name, cls in before.items():
            setattr(model_module, name, cls)
