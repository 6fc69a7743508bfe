"""`adapter: {type: lokr}`: the Kronecker product of two small matrices beside each weight."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import Values, one_of


@peft_method("lokr", replace=True)
class LoKrConfig(PeftMethod):
    r"""LoKr, Yeh et al. 2023 (LyCORIS, https://arxiv.org/abs/2309.14859).

    A layer computes `(W + (alpha / r) kron(C, B A)) x`, with C of shape [o, i], A of shape [r, in / i] and B of shape
    [out / o, r], where o and i are divisors near the square roots of the layer's sizes, or at most `decompose_factor`.
    One factor starts at zero, so the adapted model starts as the base.
    """

    paper: ClassVar[str] = "Yeh et al. 2023, https://arxiv.org/abs/2309.14859"
    good_for: ClassVar[str] = "small files with updates of high rank"
    learning_rate: ClassVar[float | None] = 2e-3
    peft_type: ClassVar[str] = "LOKR"
    title: ClassVar[str] = "LoKr"
    summary: ClassVar[str] = "Trains a Kronecker product of two small matrices beside each weight."
    values: ClassVar[dict[str, Values]] = {
        "decompose_factor": Values(
            {"anyOf": [{"type": "integer", "minimum": 1}, {"const": -1}]}, "an integer of at least 1, or -1"
        ),
        "init_weights": one_of(True, False, "lycoris"),
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the second factor. Where it is as large as the factor, that is trained whole.",
        "alpha": "Numerator of the update's scaling `alpha / r`.",
        "decompose_both": "Whether the first factor is a low-rank product too.",
        "decompose_factor": "Largest size of the first factor. -1 takes the divisors nearest to the square roots.",
        "rank_dropout_scale": "Whether what `rank_dropout` leaves is scaled up to the same mean.",
        "init_weights": "How factors start: `true` and `lycoris` each with another factor at zero, `false` at random, "
        "which changes the model before it is trained.",
    }
