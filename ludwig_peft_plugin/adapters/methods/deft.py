"""`adapter: {type: deft}`: a subspace taken out of each weight, and another put in its place."""

from typing import Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, Values


@peft_method("deft")
class DeftConfig(PeftMethod):
    r"""DEFT, decompositional efficient fine-tuning (2025, https://arxiv.org/abs/2509.22793).

    A layer computes `(W - P p(P)^T W + (alpha / r) P R) x`: P of shape [out, r] spans the outputs whose present
    content is removed, R of shape [r, in] is what takes its place, and p is the identity after a ReLU (`relu`) or P is
    made orthogonal first (`qr`). R starts as what P removes, so the adapted model starts as the base up to rounding.
    """

    paper: ClassVar[str] = "DEFT 2025, https://arxiv.org/abs/2509.22793"
    good_for: ClassVar[str] = "replacing what the base does rather than adding to it"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "DEFT"
    title: ClassVar[str] = "DEFT"
    summary: ClassVar[str] = "Removes a learned subspace from each weight and trains what takes its place."
    values: ClassVar[dict[str, Values]] = {"alpha": ABOVE_ZERO}
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the subspace.",
        "decomposition_method": "How the projection is made of P: `relu`, or `qr`, which is orthogonal.",
        "init_scale": "Spread of R where it starts at random (`init_weights: false`).",
        "alpha": "Numerator of the scaling `alpha / r` of what is put in. Null scales by 1.",
        "para": "PaRa: only remove, and put nothing in its place. Changes the model before it is trained.",
        "deft_dropout": "Dropout on the input of what is put in while training.",
    }

    def problems(self) -> list[str]:
        """Refuse options that `para` leaves without an effect."""
        options: Any = self
        idle = [name for name in ("alpha", "deft_dropout") if options.para and getattr(options, name)]
        problems = [*super().problems(), *(f"{name} has no effect with para: true; remove it." for name in idle)]
        return problems + ([] if options.init_weights is False else self.idle("init_weights: false", "init_scale"))
