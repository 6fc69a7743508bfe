"""`adapter: {type: full}`: full fine-tuning, the baseline: every weight of the base is trained."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, Batches, register
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel


@register("full")
class FullConfig(AdapterConfig):
    """Full fine-tuning: W' = W + dW for every weight, with nothing added to the model and nothing frozen.

    The weights are float32, since a bfloat16 weight (3 significant digits) is too coarse to take a small update. With
    `compute: bfloat16` they are rounded for each product (mixed precision, Micikevicius et al. 2017,
    https://arxiv.org/abs/1710.03740): the speed of bfloat16, for 2 bytes a weight beside the 16 of float32 and Adam.

    There is no adapter beside the base: the saved model is the whole model, `disable` has nothing to go back to, and
    weights of a quantised base cannot be trained.
    """

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740"
    good_for: ClassVar[str] = "the baseline; much data and memory"
    learning_rate: ClassVar[float | None] = 5e-5
    mergeable: ClassVar[bool] = True
    quantized_reason: ClassVar[str] = "its weights are rounded to 4 or 8 bits, far coarser than the updates of training"
    torchao_base: ClassVar[bool | None] = False
    trains_base: ClassVar[bool] = True

    type: str = schema_utils.ProtectedString("full", description="Full fine-tuning.")
    compute: str = schema_utils.StringOptions(
        options=["auto", "bfloat16", "float32"],
        default="auto",
        description="The number format of products: `bfloat16` rounds the float32 weights for each one, `float32` "
        "takes them as they are; `auto` is bfloat16 on a GPU that computes in it and float32 elsewhere.",
    )

    def __post_init__(self) -> None:
        """Refuse what is for adapters."""
        if self.pretrained_adapter_weights:
            raise ConfigValidationError(
                "adapter.pretrained_adapter_weights: full fine-tuning has no adapter; to go on from a trained model, "
                "give its folder as base_model."
            )

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftConfig":
        """Raise: there is nothing for PEFT to build."""
        raise AdapterError(
            "adapter.type: full trains the base itself, so it cannot stand beside other adapters, be disabled or be "
            "loaded by PEFT. Use type layers with `pattern: .*` for that."
        )

    def build(self, base: "PreTrainedModel", batches: Batches | None) -> Any:
        """Make every weight of `base` trainable, in float32, and return `base` itself."""
        return base.float().requires_grad_(True)

    def computes_in_bfloat16(self, device: "torch.device", precision: str) -> bool:
        """Return whether products are made in bfloat16 on `device`, with the `precision` of the config."""
        import torch

        if self.compute == "auto" and precision == "auto":
            return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.compute == "bfloat16"

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "Full fine-tuning"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains every weight of the base: the most capacity, and 16 bytes of memory a parameter with Adam. The "
            "saved model is the whole model."
        )
