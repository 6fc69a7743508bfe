"""`adapter: {type: cartridge}`: a trained cache of keys and values that stands for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.soft_prompt_start import encoder_of, keys_and_values_of
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


@soft_prompt("cartridge")
class CartridgeConfig(SoftPrompt):
    """Cartridges, Eyuboglu et al. 2025 (https://arxiv.org/abs/2506.06266).

    P keys and values of shape [kv_heads, P, d] in every layer, as in prefix tuning, that start as those of a text's
    first P tokens and are trained in the text's place. The first `num_frozen_tokens` of them stay as they are: models
    rest much of their attention on the first token, and moving it makes training unstable.

    The paper trains on answers that a model gave about the text; here the dataset's targets are learned. Works on 4-
    and 8-bit bases.
    """

    paper: ClassVar[str] = "Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266"
    good_for: ClassVar[str] = "a long text that many prompts share, kept as a small cache"
    learning_rate: ClassVar[float | None] = 1e-2

    peft_type: ClassVar[str] = "CARTRIDGE"
    title: ClassVar[str] = "Cartridge"
    summary: ClassVar[str] = (
        "Trains a cache of keys and values that starts as that of a text and stands before every row. The base stays "
        "as it is."
    )
    defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 32}
    texts: ClassVar[dict[str, str]] = {"num_frozen_tokens": "How many of the first virtual tokens are not trained."}

    init: str = schema_utils.StringOptions(
        options=["data", "sample_vocab", "text", "random"],
        default="data",
        description="How the cache starts: as that of the first tokens of training rows (`data`), of random tokens of "
        "the vocabulary or of `init_text`, or at random.",
    )
    init_text: str | None = schema_utils.String(
        default=None, allow_none=True, description="The text for `init: text`, repeated or cut to the cache's length."
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        options: Any = self
        problems = super().problems()
        if options.num_frozen_tokens >= options.num_virtual_tokens:
            problems.append(
                f"num_frozen_tokens: {options.num_frozen_tokens} leaves none of the {options.num_virtual_tokens} "
                "virtual tokens to train; use fewer."
            )
        return problems

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Set the cache to the tokens' keys and values; see `SoftPrompt.begin`."""
        if tokens is not None:
            encoder_of(model).load_prompt_embeddings(keys_and_values_of(base, tokens))
