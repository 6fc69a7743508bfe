"""`adapter: {type: waveft}`: a few coefficients of the update's wavelet transform."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.coefficients import fitted_frequencies
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, POSITIVE, SEED, Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USUAL = 2592
"""Coefficients per layer, as in PEFT."""


def wavelets() -> list[str]:
    """Return the wavelet families PEFT can compute; its list names some that it has no coefficients of."""
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet

    def known(name: str) -> bool:
        try:
            Wavelet(name)
        except ValueError:
            return False
        return True

    return sorted(filter(known, WAVELET_REDUCTIONS))


@peft_method("waveft", replace=True)
class WaveFTConfig(PeftMethod):
    r"""WaveFT, Bilican et al. 2025 (https://arxiv.org/abs/2505.12532).

    A layer computes `W x + scaling IDWT2(C) x`, where C has the size of W, `n_frequency` trained entries at places
    drawn once from `random_loc_seed`, and zeros elsewhere. Entries start at zero, so the adapted model starts as the
    base. Without `use_idwt` the entries are the update's own, which makes it a sparse one. PEFT's defaults are kept.
    """

    paper: ClassVar[str] = "Bilican et al. 2025, https://arxiv.org/abs/2505.12532"
    good_for: ClassVar[str] = "small files, with updates that are local in the weight"
    learning_rate: ClassVar[float | None] = 1e-4
    peft_type: ClassVar[str] = "WAVEFT"
    title: ClassVar[str] = "WaveFT"
    summary: ClassVar[str] = "Trains a few wavelet coefficients of each weight's update, at places drawn once."
    defaults: ClassVar[dict[str, Any]] = {"n_frequency": None}
    values: ClassVar[dict[str, Values]] = {
        "n_frequency": POSITIVE,
        "scaling": ABOVE_ZERO,
        "random_loc_seed": SEED,
        "wavelet_family": one_of(*wavelets()),
    }
    texts: ClassVar[dict[str, str]] = {
        "n_frequency": "Trained coefficients per layer. Null is 2592, or half of what the smallest layer has, if that "
        "is less.",
        "scaling": "Factor of the update.",
        "wavelet_family": "The wavelet. `db1` is Haar's.",
        "use_idwt": "Whether coefficients are transformed. With false they are entries of the update itself.",
        "random_loc_seed": "Seed of the places of the coefficients.",
        "n_frequency_pattern": "Numbers of coefficients that differ from `n_frequency`: by the end of a module's name, "
        "or an expression for it.",
        "proportional_parameters": "Whether larger layers get more coefficients, and all together as many.",
        "init_weights": "Whether coefficients start at zero. With false they start at random and change the model "
        "before it is trained.",
    }

    @classmethod
    @contextmanager
    def without_data(cls) -> Iterator[None]:
        """Draw no places, which takes seconds a layer, and take the mask of those inside the spectrum for all of it."""
        import torch
        from torch.fx.experimental import _config as settings

        from ludwig_peft_plugin.estimate.replace import replaced

        def places(count: int, **_: Any) -> torch.Tensor:
            return torch.zeros((), dtype=torch.int64).expand(count)

        every_place: Any = settings.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with replaced(torch, {"randperm": places}), every_place:
            yield

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the number of coefficients, and check that no layer is asked for more than it has."""
        return fitted_frequencies(self, shapes, USUAL)
