"""`adapter: {type: tinylora}`: a vector of a few numbers, spread over a weight's main singular vectors."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import SHARE, Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes, check_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("tinylora", replace=True)
class TinyLoraConfig(PeftMethod):
    r"""TinyLoRA, 2026 (https://arxiv.org/abs/2602.04118).

    A layer computes `W x + U S (sum_i v_i P_i) V^T x`: U, S and V are the weight's `r` main singular vectors and values
    and P_i random matrices [r, r], all frozen; v of shape [u] is trained, and shared by a share `weight_tying` of the
    layers. v starts at zero, so the adapted model starts as the base. On a quantised base the vectors are those of the
    dequantised weight.

    The singular vectors are computed again when an adapter is loaded. Ludwig's defaults, r 2 and u 64, are the paper's.
    """

    paper: ClassVar[str] = "TinyLoRA 2026, https://arxiv.org/abs/2602.04118"
    good_for: ClassVar[str] = "the fewest parameters there can be, down to a dozen"
    learning_rate: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str] = "TINYLORA"
    title: ClassVar[str] = "TinyLoRA"
    summary: ClassVar[str] = "Trains a few numbers per layer, spread over the weight's main singular vectors."
    values: ClassVar[dict[str, Values]] = {"weight_tying": SHARE, "init_weights": one_of(True, "uniform")}
    texts: ClassVar[dict[str, str]] = {
        "r": "Singular vectors per layer.",
        "u": "Trained numbers per layer (or per group of layers that share them).",
        "weight_tying": "Share of the layers that share one vector: 0 none, 1 all.",
        "projection_seed": "Seed of the frozen random matrices.",
        "init_v_bound": "Bound of the start with `init_weights: uniform`.",
        "tinylora_dropout": "Dropout on the input of the update while training.",
        "init_weights": "How v starts: `true` at zero, `uniform` at random, which changes the model before it is "
        "trained.",
    }

    def problems(self) -> list[str]:
        """Refuse the bound of a random start where the start is not random."""
        options: Any = self
        idle = [] if options.init_weights == "uniform" else self.idle("init_weights: uniform", "init_v_bound")
        return [*super().problems(), *idle]

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Check that every weight has so many singular vectors."""
        options: Any = self
        check_rank("r", options.r, shapes)
        return {}
