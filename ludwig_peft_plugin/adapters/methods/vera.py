"""`adapter: {type: vera}`: vectors that scale frozen random matrices which all layers share."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method


@peft_method("vera", replace=True)
class VeraConfig(PeftMethod):
    r"""VeRA, Kopiczko et al. 2023 (https://arxiv.org/abs/2310.11454).

    A layer computes `W x + b * (B (d * (A x)))`: A of shape [r, in] and B of shape [out, r] are random, frozen and
    slices of one pair for all layers; d of shape [r] and b of shape [out] are trained, `*` is the product by element.
    b starts at zero, so the adapted model starts as the base; d starts at `d_initial`.

    Rank 256 as in PEFT and the paper's language models (256 and 1024): a rank costs one number per layer. The paper
    trains with ten times LoRA's learning rate or more.
    """

    paper: ClassVar[str] = "Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454"
    good_for: ClassVar[str] = "very small adapter files, many of them"
    learning_rate: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str] = "VERA"
    title: ClassVar[str] = "VeRA"
    summary: ClassVar[str] = (
        "Trains two small vectors per layer that scale frozen random matrices, which all layers share: a tenth of "
        "LoRA's parameters."
    )
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the shared random matrices. It costs one trained number per layer and rank.",
        "d_initial": "Value the vector d starts with.",
        "vera_dropout": "Dropout on the input of the update while training.",
    }
