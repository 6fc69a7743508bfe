"""How transformers' models come to the attention over one flat row: its name there, arguments, and which models fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ludwig_peft_plugin.engine.attention import varlen_attention
from ludwig_peft_plugin.engine.prefix_attention import prefixed_attention

NAME = "ludwig_padding_free"
"""The name under which transformers knows this attention."""


def attention_for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks its attention functions to: tensors (1, heads, T, d) in, (1, T, heads, d) out.

    Without boundaries (in generation) this is transformers' own scaled dot product attention.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        arguments = {"scaling": scaling, "dropout": dropout, **others}
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return result
    if dropout:
        raise RuntimeError(f"attention {NAME!r} has no dropout; set attention_dropout to 0 in model_parameters")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if len(k) != len(q):
        assert cu_seq_lens_k is not None
        assert max_length_k is not None
        boundaries = (cu_seq_lens_q, cu_seq_lens_k, (max_length_q, max_length_k))
        return prefixed_attention(q, k, v, *boundaries, scale, others.get("sliding_window"))[None], None
    output = varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale, others.get("sliding_window"))
    return output[None], None


def flat_row(
    input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_length: int, unread_mask: Tensor
) -> dict[str, Any]:
    """Return a transformers model's arguments for sequences in one flat row (T,), with its names for the boundaries.

    A mask of four dimensions is passed on as it is, so that transformers makes none of T x T; the attention ignores it.
    """
    return {
        "input_ids": input_ids[None],
        "attention_mask": unread_mask,
        "position_ids": position_ids[None],
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


def register() -> None:
    """Make the attention known to transformers, with the masks of scaled dot product attention for generation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, attention_for_transformers)
        AttentionMaskInterface.register(NAME, sdpa_mask)


def supports_padding_free(model: Any) -> bool:
    """Return whether a transformers model can attend by `attention_for_transformers` with the same result.

    Its attention must go through transformers' interface and must be plain causal attention, with or without a
    sliding window: no position bias, soft cap or sinks, no recurrent layers, and no dropout.
    """
    config = model.config.get_text_config()
    own = vars(config).get
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and config.model_type in PLAIN_ATTENTION
        and not own("attention_dropout")
        and not own("attn_pdrop")
    )


PLAIN_ATTENTION = frozenset(
    {
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "phi3",
        "gemma",
        "gemma3_text",
        "olmo",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
        "starcoder2",
        "stablelm",
        "cohere",
        "cohere2",
        "glm",
        "glm4",
        "helium",
        "gpt2",
        "gpt_neox",
    }
)
"""transformers' model types whose attention is plain; others run on padded rows. A test compares each one's loss."""
