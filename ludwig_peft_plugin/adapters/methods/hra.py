"""`adapter: {type: hra}`: weights rotated by a chain of trained reflections."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method


@peft_method("hra", replace=True)
class HraConfig(PeftMethod):
    r"""HRA, Yuan et al. 2024 (https://arxiv.org/abs/2405.17484).

    A layer computes `W H_1 ... H_r x`, with each `H_i = I - 2 u_i u_i^T / |u_i|^2` a reflection given by one trained
    vector u_i of shape [in]. PEFT starts them in equal pairs, whose product is the identity, so the adapted model
    starts as the base; that needs an even `r`. With `apply_GS` the vectors are made orthogonal first.

    The rotation multiplies the base's weight in every forward pass (dequantised where it is quantised).
    """

    paper: ClassVar[str] = "Yuan et al. 2024, https://arxiv.org/abs/2405.17484"
    good_for: ClassVar[str] = "orthogonal updates with few parameters"
    learning_rate: ClassVar[float | None] = 2e-3
    peft_type: ClassVar[str] = "HRA"
    title: ClassVar[str] = "HRA"
    summary: ClassVar[str] = "Rotates each weight by a chain of reflections, each of which is one trained vector."
    texts: ClassVar[dict[str, str]] = {
        "r": "Number of reflections; even, or the model changes before it is trained.",
        "apply_GS": "Whether the vectors are made orthogonal to each other (Gram-Schmidt) in each forward pass. The "
        "model then changes before it is trained.",
    }
