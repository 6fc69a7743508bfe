"""`adapter: {type: randlora}`: sums of random low-rank matrices, so that the update has full rank."""

from typing import Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, Values


@peft_method("randlora")
class RandLoraConfig(PeftMethod):
    r"""RandLoRA, Albert et al. 2025 (https://arxiv.org/abs/2502.00987).

    A layer computes `W x + (randlora_alpha / r) sum_j B_j L_j A G_j x` over as many terms as the rank of W needs: A of
    shape [r, in] and B_j of shape [out, r] are random, frozen and shared by all layers; the diagonals L_j [r] and
    G_j [in] are trained. L starts at zero, so the adapted model starts as the base.

    The number of parameters falls as `r` rises. alpha is `20 r`, as in the paper.
    """

    paper: ClassVar[str] = "Albert et al. 2025, https://arxiv.org/abs/2502.00987"
    good_for: ClassVar[str] = "full-rank updates with few parameters"
    learning_rate: ClassVar[float | None] = 3e-4
    peft_type: ClassVar[str] = "RANDLORA"
    title: ClassVar[str] = "RandLoRA"
    summary: ClassVar[str] = "Trains diagonals that scale a sum of frozen random matrices of full rank together."
    defaults: ClassVar[dict[str, Any]] = {"randlora_alpha": None}
    values: ClassVar[dict[str, Values]] = {"randlora_alpha": ABOVE_ZERO}
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of each random matrix. Larger is fewer parameters.",
        "sparse": "Whether random matrices hold only -1, 0 and 1 (two thirds zeros).",
        "very_sparse": "Whether they hold even more zeros.",
        "randlora_dropout": "Dropout on the input of the update while training.",
        "randlora_alpha": "Numerator of the update's scaling. Null is `20 * r`.",
    }

    def problems(self) -> list[str]:
        """Refuse two kinds of sparseness at once."""
        options: Any = self
        twice = options.sparse and options.very_sparse
        return [*super().problems(), *(["sparse has no effect with very_sparse: true."] if twice else [])]

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.RandLoraConfig`."""
        options: Any = self
        return {"randlora_alpha": 20 * options.r} | super().peft_arguments()
