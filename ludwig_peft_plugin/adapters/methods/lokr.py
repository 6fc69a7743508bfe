"""`adapter: {type: lokr}`: the Kronecker product of two small matrices beside each weight."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def problems(self) -> list[str]:
        """Refuse to scale what a dropout leaves where there is none."""
        options: Any = self
        idle = [] if options.rank_dropout else self.idle("rank_dropout", "rank_dropout_scale")
        return [*super().problems(), *idle]

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Check that some layer has a first factor large enough to be decomposed, where it is to be."""
        from peft.tuners.lokr.layer import factorization

        options: Any = self
        rank = min([options.r, *(options.rank_pattern or {}).values()])
        factors = [factorization(size, options.decompose_factor)[0] for shape in shapes.values() for size in shape]
        if options.decompose_both and rank >= max(factors) / 2:
            raise AdapterError(
                f"adapter.decompose_both has no effect with r: {rank}: first factors are at most {max(factors)} wide, "
                "and only those of more than 2 r are decomposed. Lower r, or leave it out."
            )
        return {}
