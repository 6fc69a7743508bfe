"""`adapter: {type: delora}`: a low-rank update whose direction and strength are trained apart."""

from typing import ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, SCALES, Values


@peft_method("delora")
class DeloraConfig(PeftMethod):
    r"""DeLoRA, Bini et al. 2025 (https://arxiv.org/abs/2503.18225).

    A layer computes `W x + (lambda |W| / r) B Xi A x`, with A of shape [r, in], B of shape [out, r], Xi diagonal and
    such that each component has norm 1, `|W|` the norms of W's columns, and one trained number lambda, which bounds how
    far the weight can move. B starts at zero (and `0 / 0` counts as 0), so the adapted model starts as the base.

    Unlike LoRA's, the update cannot grow without bound, which makes high learning rates and long runs safe.
    """

    paper: ClassVar[str] = "Bini et al. 2025, https://arxiv.org/abs/2503.18225"
    good_for: ClassVar[str] = "training that stays stable at high learning rates"
    learning_rate: ClassVar[float | None] = 2e-3
    peft_type: ClassVar[str] = "DELORA"
    title: ClassVar[str] = "DeLoRA"
    summary: ClassVar[str] = "Trains the direction of a low-rank update apart from its strength, which is bounded."
    values: ClassVar[dict[str, Values]] = {"delora_lambda": ABOVE_ZERO, "lambda_pattern": SCALES.or_null()}
    texts: ClassVar[dict[str, str]] = {
        "delora_lambda": "Strength lambda at the start, which bounds the change of a weight.",
        "lambda_pattern": "Values that differ from `delora_lambda`: by the end of a module's name, or an expression.",
    }
