"""`adapter: {type: unilora}`: one trained vector for the whole model, from which all LoRA entries are taken."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, SEED, Values


@peft_method("unilora")
class UniLoraConfig(PeftMethod):
    r"""Uni-LoRA, Li et al. 2025 (https://arxiv.org/abs/2506.00799).

    A layer computes `W x + B A x` with A of shape [r, in] and B of shape [out, r], whose entries are all taken from one
    trained vector of length `theta_d_length`: each entry has a place in it, drawn once from `proj_seed`, and a fixed
    scale. The vector starts at small random numbers (`init_theta_d_bound`), so the adapted model starts near the base
    and not exactly at it.
    """

    paper: ClassVar[str] = "Li et al. 2025, https://arxiv.org/abs/2506.00799"
    good_for: ClassVar[str] = "one vector as the whole adapter"
    learning_rate: ClassVar[float | None] = 2e-2
    starts_as_base: ClassVar[bool] = False
    peft_type: ClassVar[str] = "UNILORA"
    title: ClassVar[str] = "Uni-LoRA"
    summary: ClassVar[str] = "Trains one vector for the whole model, whose numbers fill the LoRA matrices."
    values: ClassVar[dict[str, Values]] = {"proj_seed": SEED, "init_theta_d_bound": ABOVE_ZERO}
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the update.",
        "proj_seed": "Seed of the places.",
        "theta_d_length": "Length of the trained vector: the number of trained parameters.",
        "unilora_dropout": "Dropout on the input of the update while training.",
        "init_theta_d_bound": "Largest number the vector starts with.",
        "init_weights": "Whether the vector starts within `init_theta_d_bound`. With false it is drawn from a standard "
        "normal distribution.",
        "save_indices": "Whether places and scales are saved too, which makes a larger file.",
    }
