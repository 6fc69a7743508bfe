"""`adapter: {type: psoft}`: an orthogonal matrix between the principal singular vectors of each weight."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, SEED, Values
from ludwig_peft_plugin.adapters.shapes import Shapes, check_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("psoft")
class PsoftConfig(PeftMethod):
    r"""PSOFT, 2026 (https://openreview.net/forum?id=FSHrinMArK).

    A layer computes `W x + s B (D_b R D_a - I) A x`: A of shape [r, in] and B of shape [out, r] are the weight's
    principal singular vectors, frozen; R of shape [r, r] is orthogonal, the Cayley transform of a trained
    skew-symmetric matrix, and D_a, D_b are trained diagonals. R and the diagonals start as identities, so the adapted
    model starts as the base. On a quantised base the vectors are those of the dequantised weight.

    The vectors are computed again when an adapter is loaded. PEFT's defaults are kept.
    """

    paper: ClassVar[str] = "PSOFT 2026, https://openreview.net/forum?id=FSHrinMArK"
    good_for: ClassVar[str] = "orthogonal updates within a weight's main directions"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "PSOFT"
    title: ClassVar[str] = "PSOFT"
    summary: ClassVar[str] = "Trains a rotation among the principal directions of each weight."
    values: ClassVar[dict[str, Values]] = {"random_seed": SEED, "cayley_neumann_eps": ABOVE_ZERO.or_null()}
    texts: ClassVar[dict[str, str]] = {
        "r": "Number of principal directions.",
        "psoft_alpha": "Numerator of the scaling `psoft_alpha / r`.",
        "psoft_dropout": "Dropout on the input of the update while training.",
        "ab_svd_init": "How singular values are divided: `psoft_init` all to B, `pissa_init` evenly.",
        "psoft_svd": "`full`, or `lowrank`, an approximation that is faster for large weights.",
        "psoft_svd_lowrank_niter": "Iterations of the `lowrank` approximation.",
        "random_seed": "Seed of the `lowrank` approximation.",
        "psoft_orth": "Whether R is orthogonal. With false it is any matrix.",
        "psoft_mag_b": "Whether the diagonal D_b is trained.",
        "psoft_mag_a": "Whether the diagonal D_a is trained.",
        "use_cayley_neumann": "Whether the inverse in the Cayley transform is approximated by a series.",
        "num_cayley_neumann_terms": "Terms of that series.",
        "cayley_neumann_eps": "Bound of the skew-symmetric matrix for that series. Null has none.",
    }

    def problems(self) -> list[str]:
        """Refuse options of an approximation that is not made."""
        options: Any = self
        problems = super().problems()
        if options.psoft_svd != "lowrank":
            problems += self.idle("psoft_svd: lowrank", "psoft_svd_lowrank_niter", "random_seed")
        if not options.use_cayley_neumann:
            problems += self.idle("use_cayley_neumann: true", "num_cayley_neumann_terms", "cayley_neumann_eps")
        return problems

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Check that every weight has so many directions."""
        options: Any = self
        check_rank("r", options.r, shapes)
        return {}
