"""The `quantization` section: Ludwig's, with a compute dtype that follows the model's precision by default."""

from __future__ import annotations

from typing import Any

from ludwig.schema import utils as schema_utils
from ludwig.schema.llms.quantization import QuantizationConfig as StockQuantizationConfig

from ludwig_peft_plugin.config.fields import SectionField

MODES = ("float8", "int8_weight_only")
"""Modes of the backend `torchao` on which adapters are trained."""

NOT_TRAINED = {
    "int4_weight_only": (
        "is stored for inference kernels that torchao does not bring; for 4 bits use backend: bitsandbytes with "
        "bits: 4 (adapter type `qlora` brings it)"
    ),
    "int8_dynamic": (
        "rounds activations to integers, through which torchao passes no gradient; use `float8`, which rounds "
        "activations and gradients, or `int8_weight_only`, which rounds neither"
    ),
}
"""Ludwig's other modes, why adapters are not trained on them, and what works instead."""


class QuantizationConfig(StockQuantizationConfig):
    """How the base's weights are quantised when they are loaded."""

    backend: str = schema_utils.StringOptions(
        options=["bitsandbytes", "torchao"],
        default="bitsandbytes",
        allow_none=False,
        description=(
            "`bitsandbytes` stores weights in 4 or 8 bits (see `bits`), `torchao` in 8-bit rows with a scale each "
            "(see `mode`)."
        ),
    )

    mode: str | None = schema_utils.StringOptions(
        options=[*MODES, *NOT_TRAINED],
        default=None,
        allow_none=True,
        description=(
            "Of `backend: torchao`. `float8` also multiplies in float8 on GPUs that can (Ada, Hopper and later), which "
            "is faster; `int8_weight_only` multiplies in `precision`, and its weights are nearer to the original."
        ),
    )

    qat: bool = schema_utils.Boolean(
        default=False,
        description="Not for language models: it trains the base's weights, and those of a quantised base stay fixed.",
    )

    float8_transposed_copy: bool = schema_utils.Boolean(
        default=True,
        description=(
            "Whether float8 weights are kept a second time, transposed, while training on a GPU that multiplies in "
            "float8. Takes one more byte a weight; without it they are transposed in every backward pass, with the "
            "same result."
        ),
    )

    bnb_4bit_compute_dtype: str = schema_utils.StringOptions(
        options=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        description="The number format that 4-bit weights are multiplied in; `auto` is that of `precision`.",
    )

    def to_bitsandbytes(self) -> Any:
        """Return the transformers quantisation config.

        A compute dtype of `auto` comes out as float32, right on every device; who loads the model and knows its
        precision sets that in its place.
        """
        from transformers import BitsAndBytesConfig

        compute = "float32" if self.bnb_4bit_compute_dtype == "auto" else self.bnb_4bit_compute_dtype
        return BitsAndBytesConfig(
            load_in_4bit=self.bits == 4,
            load_in_8bit=self.bits == 8,
            llm_int8_threshold=self.llm_int8_threshold,
            llm_int8_has_fp16_weight=self.llm_int8_has_fp16_weight,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
        )


class QuantizationField(SectionField):
    """A quantization section, or null for none."""

    def __init__(self) -> None:
        super().__init__("quantization", QuantizationConfig, off_by_default=True)
