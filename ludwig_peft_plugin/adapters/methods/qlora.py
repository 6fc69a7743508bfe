"""`adapter: {type: qlora}`: LoRA on a base that is quantised to 4 bits, without having to say so."""

from typing import Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import register
from ludwig_peft_plugin.adapters.lora_options import LoraOptions, target_modules_option


@register("qlora")
class QLoraConfig(LoraOptions):
    """QLoRA, Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314).

    From the paper: 4-bit NormalFloat with double quantisation, and adapters on all linear layers, which it finds
    necessary to match full fine-tuning while the rank hardly matters then (sections 2, 4 and appendix A). Rank 16
    is therefore used where the paper uses 64; alpha is Ludwig's `2 * r`; dropout 0.05 is the paper's value for its
    33B and 65B models (0.1 for smaller ones) and Ludwig's for LoRA.

    A `quantization` section in the config takes the place of the default.
    """

    paper: ClassVar[str] = "Dettmers et al. 2023, https://arxiv.org/abs/2305.14314"
    good_for: ClassVar[str] = "a base that does not fit in bf16"
    encoder: ClassVar[bool] = False
    default_quantization: ClassVar[dict[str, Any] | None] = {
        "bits": 4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }

    type: str = schema_utils.ProtectedString("qlora", description="LoRA on a 4-bit base (QLoRA).")
    r: int = schema_utils.PositiveInteger(default=16, description="Rank of the update.")
    target_modules: list[str] | str | None = target_modules_option(default="all-linear")

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "QLoRA"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "LoRA on a base stored in 4-bit NormalFloat: about a quarter of the memory for the base's weights, at "
            "almost the quality of LoRA. Brings its own quantization section."
        )
