"""`adapter: {type: prompt_tuning}`: embeddings before those of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.soft_prompt_start import embeddings_of, encoder_of
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


@soft_prompt("prompt_tuning")
class PromptTuningConfig(SoftPrompt):
    """Prompt tuning, Lester et al. 2021 (https://arxiv.org/abs/2104.08691).

    P trained embeddings stand before those of every row: the model reads `[p_1 ... p_P; x]`, p of shape [P, hidden].

    The paper finds embeddings of real tokens a better start than random ones, most of all in small models; so they
    start as random tokens of the vocabulary. Random ones are not only another place, but of another size: PEFT draws
    them with a standard deviation of 1, where a model's embeddings have a few hundredths. Few weights take large
    steps, hence the learning rate. Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Lester et al. 2021, https://arxiv.org/abs/2104.08691"
    good_for: ClassVar[str] = "the fewest weights of all, on large bases"
    learning_rate: ClassVar[float | None] = 1e-2

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    title: ClassVar[str] = "Prompt tuning"
    summary: ClassVar[str] = "Trains embeddings that stand before every row. The base stays as it is."
    defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 32}

    init: str = schema_utils.StringOptions(
        options=["sample_vocab", "text", "data", "random"],
        default="sample_vocab",
        description="How the virtual tokens start: as random tokens of the vocabulary, as those of `init_text`, as the "
        "first tokens of training rows (`data`), or at random.",
    )
    init_text: str | None = schema_utils.String(
        default=None, allow_none=True, description="The text for `init: text`, repeated or cut to the prompt's length."
    )

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Set the prompt to the tokens' embeddings; see `SoftPrompt.begin`."""
        if tokens is not None:
            with torch.no_grad():
                encoder_of(model).embedding.weight.copy_(embeddings_of(base, tokens))
