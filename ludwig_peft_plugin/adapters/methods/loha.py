"""`adapter: {type: loha}`: the product by element of two low-rank matrices beside each weight."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method


@peft_method("loha", replace=True)
class LoHaConfig(PeftMethod):
    r"""LoHa, Hyeon-Woo et al. 2021 (FedPara, https://arxiv.org/abs/2108.06098).

    A layer computes `(W + (alpha / r) (B1 A1) * (B2 A2)) x`, with A1 and A2 of shape [r, in], B1 and B2 of shape
    [out, r] and `*` the product by element, whose rank can be r^2. One of the four starts at zero, so the adapted model
    starts as the base.

    Twice LoRA's parameters at the same r; alpha is Ludwig's and PEFT's 8.
    """

    paper: ClassVar[str] = "Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098"
    good_for: ClassVar[str] = "updates of high rank with few parameters"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "LOHA"
    title: ClassVar[str] = "LoHa"
    summary: ClassVar[str] = (
        "Trains the element-wise product of two low-rank matrices, whose rank is up to the square of theirs."
    )
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of each of the two factors.",
        "alpha": "Numerator of the update's scaling `alpha / r`.",
    }
