"""`adapter: {type: p_tuning}`: embeddings before every row that a small network makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.peft_schema import Values, one_of
from ludwig_peft_plugin.adapters.soft_prompt_start import embeddings_of, encoder_of, fit_last_layer
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

LSTM_ONLY = {"encoder_num_layers": 2, "encoder_dropout": 0.0}
"""Options that the MLP does not read, with their defaults."""


@soft_prompt("p_tuning")
class PTuningConfig(SoftPrompt):
    """P-tuning, Liu et al. 2021 (https://arxiv.org/abs/2103.10385).

    P embeddings before every row, as in prompt tuning, are made by a network from P trained vectors: an MLP of three
    layers, or an LSTM in both directions with an MLP of two on top. The network ties the virtual tokens together while
    training and is dropped afterwards.

    PEFT leaves the network as it is drawn. Here its last layer starts so that the virtual tokens are tokens of the
    vocabulary, as in `prompt_tuning`. Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Liu et al. 2021, https://arxiv.org/abs/2103.10385"
    good_for: ClassVar[str] = "prompt tuning that learns faster, at more weights while training"
    learning_rate: ClassVar[float | None] = 1e-3

    peft_type: ClassVar[str] = "P_TUNING"
    title: ClassVar[str] = "P-tuning"
    summary: ClassVar[str] = (
        "Trains embeddings that stand before every row through a small network (MLP or LSTM), which is dropped "
        "afterwards. The base stays as it is."
    )
    defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 32}
    values: ClassVar[dict[str, Values]] = {"encoder_reparameterization_type": one_of("MLP", "LSTM")}
    texts: ClassVar[dict[str, str]] = {
        "encoder_reparameterization_type": "The network: `MLP` or `LSTM`.",
        "encoder_num_layers": "Layers of the LSTM.",
        "encoder_dropout": "Dropout between the layers of the LSTM.",
    }

    init: str = schema_utils.StringOptions(
        options=["sample_vocab", "text", "data", "random"],
        default="sample_vocab",
        description="What the network gives at the start: random tokens of the vocabulary, those of `init_text`, the "
        "first tokens of training rows (`data`), or what random weights give.",
    )
    init_text: str | None = schema_utils.String(
        default=None, allow_none=True, description="The text for `init: text`, repeated or cut to the prompt's length."
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        problems = super().problems()
        if getattr(self, "encoder_reparameterization_type", "MLP") == "MLP":
            problems += [
                f"{name} has no effect with encoder_reparameterization_type: MLP; use LSTM, or remove it."
                for name, default in LSTM_ONLY.items()
                if getattr(self, name, default) != default
            ]
        elif getattr(self, "encoder_dropout", 0.0) and getattr(self, "encoder_num_layers", 2) < 2:
            problems.append("encoder_dropout has no effect in an LSTM of one layer; use encoder_num_layers: 2 or more.")
        return problems

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Let the network give the tokens' embeddings; see `SoftPrompt.begin`."""
        if tokens is not None:
            fit_last_layer(encoder_of(model), embeddings_of(base, tokens))
