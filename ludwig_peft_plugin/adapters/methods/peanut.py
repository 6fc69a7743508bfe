"""`adapter: {type: peanut}`: a small network that makes the update out of the weight itself."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, NOT_NEGATIVE, Values


@peft_method("peanut")
class PeanutConfig(PeftMethod):
    r"""PEANuT, Zhong et al. 2024 (https://arxiv.org/abs/2410.01870).

    A layer computes `(W + scaling f(W)) x`, where f is a small network over the weight: down to rank `r`, a
    non-linearity and `depth` pairs of residual layers [r, r], and up again by a matrix that starts at zero, so the
    adapted model starts as the base. The update is computed in every forward pass, of a dequantised weight where the
    base is quantised. PEFT's defaults are kept.
    """

    paper: ClassVar[str] = "Zhong et al. 2024, https://arxiv.org/abs/2410.01870"
    good_for: ClassVar[str] = "updates that depend on the weight in a non-linear way"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "PEANUT"
    title: ClassVar[str] = "PEANuT"
    summary: ClassVar[str] = "Trains a small network that computes each weight's update from the weight."
    values: ClassVar[dict[str, Values]] = {"depth": NOT_NEGATIVE, "scaling": ABOVE_ZERO}
    texts: ClassVar[dict[str, str]] = {
        "r": "Width of the network.",
        "depth": "Pairs of further layers in the network.",
        "act_fn": "The network's non-linearity, by transformers' names: `relu`, `gelu`, `silu`, `tanh` and others.",
        "scaling": "Factor of the update.",
    }
