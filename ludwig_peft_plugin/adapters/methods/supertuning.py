"""`adapter: {type: supertuning}`: the entries of each weight that are largest, or smallest."""

from typing import Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, DROPOUT, POSITIVE, Values


@peft_method("supertuning")
class SupertuningConfig(PeftMethod):
    r"""Super-Tuning, 2026 (https://arxiv.org/abs/2607.09287).

    A layer computes `(W + S) x`, where S has a share `1 - sparsity` of trained entries, at the places of the largest
    (`select_top`) or smallest numbers of W, and zeros elsewhere. They start at zero, so the adapted model starts as the
    base. With `r` a LoRA of that rank is trained beside it (Supra). On a quantised base the places are those of the
    dequantised weight, of whose equal numbers some are taken.
    """

    paper: ClassVar[str] = "Super-Tuning 2026, https://arxiv.org/abs/2607.09287"
    good_for: ClassVar[str] = "changing few entries of the base, the ones that matter most"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "SUPERTUNING"
    title: ClassVar[str] = "Super-Tuning"
    summary: ClassVar[str] = "Trains the entries of each weight that are largest, and leaves the rest."
    values: ClassVar[dict[str, Values]] = {
        "sparsity": Values({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number from 0 to below 1"),
        "r": POSITIVE.or_null(),
        "lora_alpha": ABOVE_ZERO.or_null(),
        "lora_dropout": DROPOUT,
    }
    texts: ClassVar[dict[str, str]] = {
        "sparsity": "Share of a weight's entries that stay as they are.",
        "select_top": "Whether the largest numbers are trained. With false the smallest are.",
        "r": "Rank of a LoRA beside the entries. Null trains none.",
        "lora_alpha": "Numerator of that LoRA's scaling. Null is `2 * r`.",
        "lora_dropout": "Dropout on that LoRA's input while training.",
        "save_precomputed_indices": "Whether the places are saved too. Without, they are found again in the base.",
    }

    def problems(self) -> list[str]:
        """Refuse options of a LoRA that is not there."""
        options: Any = self
        idle = [name for name in ("lora_alpha", "lora_dropout") if options.r is None and getattr(options, name)]
        return [*super().problems(), *(f"{name} has no effect without r; give r, or remove it." for name in idle)]
