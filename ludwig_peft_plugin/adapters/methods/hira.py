"""`adapter: {type: hira}`: each weight multiplied by element with one plus a low-rank matrix."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method


@peft_method("hira")
class HiraConfig(PeftMethod):
    r"""HiRA, Huang et al. 2025 (https://openreview.net/forum?id=TwJrTz9cRS).

    A layer computes `(W + W * (B A)) x`, with A of shape [r, in], B of shape [out, r] and `*` the product by element,
    so the update has W's rank. B starts at zero, so the adapted model starts as the base. The update is made of the
    base's weight in every forward pass, from a quantised one after it was dequantised.

    Rank 32 as in the paper and PEFT.
    """

    paper: ClassVar[str] = "Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS"
    good_for: ClassVar[str] = "updates of high rank with LoRA's number of parameters"
    learning_rate: ClassVar[float | None] = 2e-3
    peft_type: ClassVar[str] = "HIRA"
    title: ClassVar[str] = "HiRA"
    summary: ClassVar[str] = "Multiplies each weight by element with one plus a trained low-rank matrix."
    removed: ClassVar[dict[str, str]] = {
        "rank_pattern": "PEFT's HiRA reads it and gives every layer the rank `r`",
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the matrix that the weight is multiplied with.",
        "hira_dropout": "Dropout on the input of the update while training.",
        "init_weights": "How A and B start: `true` (B zero), `gaussian` (A normal, B zero), or `false`, which changes "
        "the model before it is trained.",
    }
