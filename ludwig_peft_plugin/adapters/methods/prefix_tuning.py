"""`adapter: {type: prefix_tuning}`: keys and values before those of every layer's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.soft_prompt_start import encoder_of, fit_last_layer, keys_and_values_of
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


@soft_prompt("prefix_tuning")
class PrefixTuningConfig(SoftPrompt):
    """Prefix tuning, Li & Liang 2021 (https://arxiv.org/abs/2101.00190).

    In every layer, P trained keys and values of shape [kv_heads, P, d] stand before those of the tokens:
    `attention(q, [P_k; K], [P_v; V])`. They are trained themselves, or with `prefix_projection` made by a network
    `W_2 tanh(W_1 e + b_1) + b_2` from P embeddings e, which is dropped after training.

    The paper found a prefix of real tokens' activations better than a random one, and so did PEFT's comparison (0.42
    against 0.36 from zeros and 0.19 at a smaller learning rate); so they start as the keys and values of the first
    tokens of the training rows, with a projection too. A prefix of zeros is not the base either: attention is shared
    with it. Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Li & Liang 2021, https://arxiv.org/abs/2101.00190"
    good_for: ClassVar[str] = "steering a frozen base per task, with every layer reached"
    learning_rate: ClassVar[float | None] = 5e-3
    aliases: ClassVar[tuple[str, ...]] = ("prefix",)

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    title: ClassVar[str] = "Prefix tuning"
    summary: ClassVar[str] = (
        "Trains keys and values that stand before every row in the attention of each layer. The base stays as it is."
    )
    defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 32}
    texts: ClassVar[dict[str, str]] = {
        "prefix_projection": "Whether a network with one hidden layer makes the keys and values while training, which "
        "the paper found stabler, at many more weights.",
    }

    init: str = schema_utils.StringOptions(
        options=["data", "sample_vocab", "text", "zero", "random"],
        default="data",
        description="How the prefix starts: as the keys and values of the first tokens of training rows (`data`), of "
        "random tokens of the vocabulary, or of `init_text`; as zeros; or at random.",
    )
    init_text: str | None = schema_utils.String(
        default=None, allow_none=True, description="The text for `init: text`, repeated or cut to the prefix's length."
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        problems = super().problems()
        projects = getattr(self, "prefix_projection", False)
        if getattr(self, "encoder_hidden_size", None) is not None and not projects:
            problems.append(
                "encoder_hidden_size has no effect without prefix_projection: true; add that, or remove it."
            )
        return problems

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Set the prefix, or the projection that makes it, to the tokens' keys and values; see `SoftPrompt.begin`."""
        encoder = encoder_of(model)
        if tokens is None and self.start != "zero":
            return
        if tokens is None:
            last = encoder.transform[-1] if encoder.prefix_projection else encoder.embedding
            torch.nn.init.zeros_(last.weight)
            if encoder.prefix_projection:
                torch.nn.init.zeros_(last.bias)
            return
        wanted = keys_and_values_of(base, tokens)
        if encoder.prefix_projection:
            fit_last_layer(encoder, wanted)
        else:
            encoder.load_prompt_embeddings(wanted)
