"""`adapter: {type: fourierft}`: a few coefficients of the update's two-dimensional Fourier transform."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.coefficients import fitted_frequencies
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, POSITIVE, SEED, Values
from ludwig_peft_plugin.adapters.shapes import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USUAL = 1000
"""Coefficients per layer, as in PEFT."""


@peft_method("fourierft", replace=True)
class FourierFTConfig(PeftMethod):
    r"""FourierFT, Gao et al. 2024 (https://arxiv.org/abs/2405.03003).

    A layer computes `W x + scaling Re(IDFT2(F)) x`, where F of shape [out, in] has `n_frequency` trained entries at
    places drawn once from `random_loc_seed`, and zeros elsewhere. The update has full rank, however few entries.

    The paper and PEFT draw the entries from a normal distribution; here they start at zero by default, so the adapted
    model starts as the base. 1000 entries per layer and scaling 150 are PEFT's and Ludwig's defaults; the paper's for
    language models are 1000 and 64 to 300.
    """

    paper: ClassVar[str] = "Gao et al. 2024, https://arxiv.org/abs/2405.03003"
    good_for: ClassVar[str] = "the smallest files, with a choice of their exact size"
    learning_rate: ClassVar[float | None] = 1e-2
    peft_type: ClassVar[str] = "FOURIERFT"
    title: ClassVar[str] = "FourierFT"
    summary: ClassVar[str] = "Trains a few Fourier coefficients of each weight's update, at places drawn once."
    defaults: ClassVar[dict[str, Any]] = {"init_weights": True, "n_frequency": None}
    values: ClassVar[dict[str, Values]] = {"n_frequency": POSITIVE, "scaling": ABOVE_ZERO, "random_loc_seed": SEED}
    texts: ClassVar[dict[str, str]] = {
        "n_frequency": "Trained coefficients per layer. Null is 1000, or half of what the smallest layer has, if that "
        "is less.",
        "scaling": "Factor of the update.",
        "random_loc_seed": "Seed of the places of the coefficients.",
        "n_frequency_pattern": "Numbers of coefficients that differ from `n_frequency`: by the end of a module's name, "
        "or an expression for it.",
        "init_weights": "Whether coefficients start at zero. With false they start at random, as in the paper, and "
        "change the model before it is trained.",
    }

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the number of coefficients, and check that no layer is asked for more than it has."""
        return fitted_frequencies(self, shapes, USUAL)
