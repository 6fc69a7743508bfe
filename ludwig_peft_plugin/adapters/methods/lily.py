"""`adapter: {type: lily}`: down-projections shared by neighbouring layers, up-projections mixed by a router."""

from typing import ClassVar

from ludwig_peft_plugin.adapters import lily_tokens
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, Values


@peft_method("lily")
class LilyConfig(PeftMethod):
    r"""Lily, Zhong et al. 2024 (https://arxiv.org/abs/2407.09946), with a router that decides for each token by itself.

    A layer computes `W x + scaling sum_e softmax(R A x)_e B_e A x`: A of shape [r, in] is shared by `stride_A`
    neighbouring layers, the `num_B` matrices B_e of shape [out, r] by all layers of one kind, and each layer has a
    router R of shape [num_B, r]. The B_e start at zero, so the adapted model starts as the base.

    PEFT averages the router's choice over all tokens of a batch. In a causal model every token would then depend on
    those after it and on the rows beside it; here it is made per token, and saved as a type of its own
    (`LILY_TOKENS`), which `ludwig_peft_plugin.adapters.lily_tokens` makes known to PEFT.
    """

    paper: ClassVar[str] = "Zhong et al. 2024, https://arxiv.org/abs/2407.09946"
    good_for: ClassVar[str] = "high ranks at few parameters, by sharing among layers"
    learning_rate: ClassVar[float | None] = 1e-3
    mergeable: ClassVar[bool] = False
    shared_by_name: ClassVar[bool] = True
    peft_module: ClassVar[str | None] = lily_tokens.__name__
    peft_type: ClassVar[str] = lily_tokens.PEFT_TYPE
    title: ClassVar[str] = "Lily"
    summary: ClassVar[str] = "Shares low-rank factors among layers; a router in each layer mixes the second ones."
    values: ClassVar[dict[str, Values]] = {
        "num_B": Values({"type": "integer", "minimum": 2}, "an integer of at least 2"),
        "scaling": ABOVE_ZERO,
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the update.",
        "stride_A": "Neighbouring layers that share A.",
        "num_B": "Matrices B among which the routers choose.",
        "scaling": "Factor of the update.",
        "init_weights": "Whether the B start at zero. With false they are random, which changes the model before it is "
        "trained.",
    }
