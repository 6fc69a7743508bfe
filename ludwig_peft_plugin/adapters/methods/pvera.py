"""`adapter: {type: pvera}`: VeRA with a learned distribution in the place of a vector."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import SEED, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("pvera")
class PveraConfig(PeftMethod):
    r"""PVeRA, 2025 (https://arxiv.org/abs/2512.07703).

    A layer computes `W x + b * (B z)` with `z ~ N(m, exp(v))` and `(m, v) = d * (A x)`: A of shape [2 r, in] and B of
    shape [out, r] are random, frozen and shared by all layers, d and b are trained vectors. While training, z is drawn;
    otherwise it is m, unless `sample_at_inference`. b starts at zero, so the adapted model starts as the base.
    """

    paper: ClassVar[str] = "PVeRA 2025, https://arxiv.org/abs/2512.07703"
    good_for: ClassVar[str] = "VeRA's tiny adapters with noise that regularises"
    learning_rate: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str] = "PVERA"
    title: ClassVar[str] = "PVeRA"
    summary: ClassVar[str] = "VeRA whose inner vector is drawn from a learned distribution while training."
    values: ClassVar[dict[str, Values]] = {"generator_seed": SEED.or_null()}
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the shared random matrices.",
        "d_initial": "Value the vector d starts with.",
        "pvera_dropout": "Dropout on the input of the update while training.",
        "sample_at_inference": "Whether answers are drawn from the distribution too. Such an adapter cannot be merged.",
        "generator_seed": "Seed of the draws, null for torch's generator. With a seed of its own, a resumed run draws "
        "the first numbers again.",
    }

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return that a distribution has no place in a weight."""
        options: Any = self
        if options.sample_at_inference:
            return "adapter.sample_at_inference: true draws anew in each forward pass, which a merged weight cannot."
        return None
