"""Which modules of a text encoder get an adapter when the config does not say, where PEFT has no default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ludwig.schema.llms.peft import BaseAdapterConfig
    from transformers import PreTrainedModel

ATTENTION = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "deberta": ["in_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "longformer": ["query", "value"],
    "modernbert": ["Wqkv"],
    "openai-gpt": ["c_attn"],
    "xlm": ["q_lin", "v_lin"],
    "xlnet": ["layer_1", "layer_2"],
}
"""Query and value projections by architecture, as LoRA's paper adapts them; of XLNet, whose attention has no linear
layers, the feed-forward ones."""


def with_default_targets[T: BaseAdapterConfig](transformer: PreTrainedModel, adapter: T) -> T:
    """Return the adapter section with `target_modules` filled in where the config and PEFT name none."""
    kind = str(transformer.config.model_type)
    known: Any = getattr(adapter, "architecture_targets", None)
    if getattr(adapter, "target_modules", "") is not None or kind not in ATTENTION or known is None or known(kind):
        return adapter
    filled: T = adapter.model_copy(update={"target_modules": ATTENTION[kind]})
    return filled
