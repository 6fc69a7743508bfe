"""`adapter: {type: adaption_prompt}`: LLaMA-Adapter, gated attention over trained tokens in the upper layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.base import Batches
from ludwig_peft_plugin.adapters.peft_schema import POSITIVE, Values
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@soft_prompt("adaption_prompt")
class AdaptionPromptConfig(SoftPrompt):
    """LLaMA-Adapter, Zhang et al. 2023 (https://arxiv.org/abs/2303.16199).

    The attention of a layer becomes `attention(q, K, V) + g softmax(q (p W_k)^T / sqrt(d)) p W_v`, summed before the
    output projection: p, of shape [1, P, hidden], are trained tokens that only this layer sees, W_k and W_v are the
    layer's own and g, a number, starts at zero. So the model starts as the base, and the tokens take up none of its
    context.

    The paper adapts the upper 30 of 32 layers with 10 tokens; here it is 10 tokens in all layers. PEFT's comparison
    found a learning rate of 5e-3 far better than 5e-4 (0.38 against 0.21). PEFT has it for Llama, Mistral and GPT-2.
    Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Zhang et al. 2023, https://arxiv.org/abs/2303.16199"
    good_for: ClassVar[str] = "a prompt that starts as the base and costs no context"
    learning_rate: ClassVar[float | None] = 5e-3
    starts_as_base: ClassVar[bool] = True
    several: ClassVar[bool] = False

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    title: ClassVar[str] = "Adaption prompt (LLaMA-Adapter)"
    summary: ClassVar[str] = (
        "Trains tokens that the attention of each layer sees through a gate, which starts closed. The base stays as it "
        "is."
    )
    removed: ClassVar[dict[str, str]] = {
        "target_modules": "PEFT knows the attention modules of the architectures it has the method for",
    }
    defaults: ClassVar[dict[str, Any]] = {"adapter_len": 10}
    values: ClassVar[dict[str, Values]] = {"adapter_len": POSITIVE, "adapter_layers": POSITIVE}
    texts: ClassVar[dict[str, str]] = {
        "adapter_len": "How many tokens each layer gets.",
        "adapter_layers": "How many layers, counted from the top, get tokens. Null is all.",
    }

    def build(self, base: PreTrainedModel, batches: Batches | None) -> PeftModel:
        """Put a new adapter on `base`; see `AdapterConfig.build`."""
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

        from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft

        options: Any = self
        kind = base.config.model_type
        if kind not in TRANSFORMERS_MODEL_CONFIG:
            raise AdapterError(
                f"adapter.type: adaption_prompt is not for models of type {kind!r}, only for "
                f"{', '.join(sorted(TRANSFORMERS_MODEL_CONFIG))}. prefix_tuning works on every model."
            )
        layers = int(base.config.get_text_config().num_hidden_layers)
        if options.adapter_layers is not None and options.adapter_layers > layers:
            raise AdapterError(
                f"adapter.adapter_layers: {options.adapter_layers}, but the base has {layers} layers; use no more."
            )
        return wrap_with_peft(
            base, self.to_config(task_type="CAUSAL_LM", adapter_layers=options.adapter_layers or layers)
        )

    def merge_obstacle(self, base: PreTrainedModel) -> str | None:
        """Return why this adapter cannot be merged: its attention is no product with a weight."""
        return f"adapter.type: {self.type} adds attention over tokens of its own, which no weight of the base can hold."
