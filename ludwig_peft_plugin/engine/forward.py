"""Run a micro-batch through a transformers model, without padding where the model's attention allows it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.attention import padded_places
from ludwig_peft_plugin.engine.cached_tokens import readable_caches
from ludwig_peft_plugin.engine.dropout import draw_seed
from ludwig_peft_plugin.engine.graphs import graphed_states
from ludwig_peft_plugin.engine.install import prepare, refresh_adapters, selects_rows
from ludwig_peft_plugin.engine.model_input import ModelInput, VirtualTokens
from ludwig_peft_plugin.engine.transformers_attention import flat_row, supports_padding_free
from ludwig_peft_plugin.engine.virtual_tokens import virtual_tokens

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Options of transformers' configs by which logits are more than hidden states times the output matrix."""


def output_layer(model: Any) -> nn.Module | None:
    """Return the layer that alone turns hidden states into logits, None where a model does more than that."""
    base = unwrapped(model)
    head: nn.Module | None = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    config = base.config.get_text_config()
    if _backbone(base) is None or any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_CHANGES):
        return None
    return head


def frozen_matrix(head: Any) -> Tensor | None:
    """Return the output matrix (V, H) of a plain output layer that is not trained and multiplies in its own dtype."""
    plain = type(head) is nn.Linear
    if not plain or head.bias is not None or head.weight.requires_grad or torch.is_autocast_enabled("cuda"):
        return None
    return head.weight


def target_states(model: Any, batch: MicroBatch) -> Tensor:
    """Return the final hidden states that predict each target, shape (M, H)."""
    base = unwrapped(model)
    backbone = _backbone(base)
    if backbone is None:
        raise TypeError(f"{type(base).__name__} keeps no backbone apart from its output layer")
    if base.training:
        draw_seed(batch.input_ids.device)
    virtual = virtual_tokens(model, batch.task_ids)
    if virtual is not None:
        with readable_caches(base, virtual):
            given = _with_virtual_tokens(base, batch, virtual)
            states: Tensor = backbone(**given.arguments).last_hidden_state
            return states.flatten(0, 1)[given.places[batch.target_positions]]
    if supports_padding_free(base):
        prepare(base)
        graphed = graphed_states(base, backbone, batch)
        if graphed is not None:
            return graphed
        refresh_adapters(base)
        if selects_rows(base):
            states = backbone(**_flat(batch), output_rows=batch.target_positions).last_hidden_state
            return states[0]
        states = backbone(**_flat(batch)).last_hidden_state
        return states[0][batch.target_positions]
    places = padded_places(batch.cu_seqlens, batch.max_length, len(batch.input_ids))
    states = backbone(input_ids=_rows(batch, places), use_cache=False).last_hidden_state
    return states.flatten(0, 1)[places[batch.target_positions]]


def target_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Return the logits that predict each target, shape (M, V), by the model's own output layer."""
    base = unwrapped(model)
    if base.training:
        draw_seed(batch.input_ids.device)
    virtual = virtual_tokens(model, batch.task_ids)
    if virtual is not None:
        with readable_caches(base, virtual):
            given = _with_virtual_tokens(base, batch, virtual)
            return _logits_at(base, given.arguments, given.places[batch.target_positions], given.row_length)
    if supports_padding_free(base) and _keeps_logits(base):
        prepare(base)
        refresh_adapters(base)
        logits: Tensor = base(**_flat(batch), logits_to_keep=batch.target_positions).logits
        return logits[0]
    places = padded_places(batch.cu_seqlens, batch.max_length, len(batch.input_ids))
    rows = {"input_ids": _rows(batch, places), "use_cache": False}
    return _logits_at(base, rows, places[batch.target_positions], batch.max_length)


def _logits_at(base: Any, arguments: dict[str, Any], wanted: Tensor, row_length: int) -> Tensor:
    """Return the logits at places of the flattened output, shape (M, V), making few others where the model can."""
    if not _keeps_logits(base):
        logits: Tensor = base(**arguments).logits
        return logits.flatten(0, 1)[wanted]
    columns, place = torch.unique(wanted % row_length, return_inverse=True)
    logits = base(**arguments, logits_to_keep=columns).logits
    return logits[wanted // row_length, place]


def _with_virtual_tokens(base: Any, batch: MicroBatch, virtual: VirtualTokens) -> ModelInput:
    """Return the input of a model with a soft prompt, which runs without CUDA graphs: they know token ids alone."""
    if not supports_padding_free(base):
        return virtual.padded(base, batch)
    prepare(base)
    refresh_adapters(base)
    return virtual.flat(base, batch)


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model; adapters of layers stay part of it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _backbone(base: Any) -> Any:
    """Return the part of a causal language model that makes hidden states."""
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), None)
    return backbone if isinstance(backbone, nn.Module) and backbone is not base else None


def _keeps_logits(base: Any) -> bool:
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _flat(batch: MicroBatch) -> dict[str, Any]:
    unread_mask = batch.input_ids.new_ones((1, 1, 1, 1))
    return flat_row(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_length, unread_mask)


def _rows(batch: MicroBatch, places: Tensor) -> Tensor:
    """Return the sequences as rows padded on the right, where causal attention never looks; shape (S, L)."""
    shape = (len(batch.cu_seqlens) - 1, batch.max_length)
    return batch.input_ids.new_zeros(shape[0] * shape[1]).index_copy(0, places, batch.input_ids).view(shape)
