"""`adapter: {type: lora}`: low-rank adaptation, in place of Ludwig's own type of that name."""

from typing import ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import register
from ludwig_peft_plugin.adapters.lora_options import LoraOptions


@register("lora", replace=True)
class LoraConfig(LoraOptions):
    """LoRA with Ludwig's defaults: rank 8, dropout 0.05, on the modules PEFT has for the architecture.

    Accepts every config of Ludwig's own `lora`. Paper: https://arxiv.org/abs/2106.09685.
    """

    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2106.09685"
    good_for: ClassVar[str] = "the usual choice"

    type: str = schema_utils.ProtectedString("lora", description="Low-rank adaptation (LoRA).")

    use_dora: bool = schema_utils.Boolean(
        default=False,
        description="Decompose weights into magnitude and direction, as the adapter type `dora` does "
        "(https://arxiv.org/abs/2402.09353).",
    )

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "LoRA"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains a low-rank update beside frozen linear layers: few parameters, no cost at inference once merged. "
            "The usual choice. Works on full-precision, 8-bit and 4-bit bases."
        )
