"""`adapter: {type: gralora}`: a small LoRA for each block of a weight."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.shapes import Shapes, check_divides, inputs, outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("gralora")
class GraloraConfig(PeftMethod):
    r"""GraLoRA, Jung et al. 2025 (https://arxiv.org/abs/2505.20355).

    The update is divided into `k x k` blocks of shape [out / k, in / k], and each has a LoRA of rank `r / k` of its
    own: as many parameters as LoRA of rank r, and a rank of up to `k r`. Scaled by `alpha / (r + hybrid_r)`. One factor
    of each block starts at zero, so the adapted model starts as the base. With `hybrid_r` a plain LoRA stands beside.
    """

    paper: ClassVar[str] = "Jung et al. 2025, https://arxiv.org/abs/2505.20355"
    good_for: ClassVar[str] = "high ranks, where plain LoRA stops gaining"
    learning_rate: ClassVar[float | None] = 5e-4
    peft_type: ClassVar[str] = "GRALORA"
    title: ClassVar[str] = "GraLoRA"
    summary: ClassVar[str] = "Divides each weight into blocks and trains a small LoRA for each of them."
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the update; a multiple of `gralora_k`.",
        "hybrid_r": "Rank of a plain LoRA beside the blocks.",
        "alpha": "Numerator of the update's scaling.",
        "gralora_dropout": "Dropout on the input of the update while training.",
        "gralora_k": "Blocks along each side of a weight; divides its inputs and outputs. The paper has 2 for ranks up "
        "to 32, 4 above.",
    }

    def problems(self) -> list[str]:
        """Refuse a rank that cannot be divided among blocks."""
        options: Any = self
        odd = options.r % options.gralora_k
        extra = [f"r: {options.r} is not a multiple of gralora_k: {options.gralora_k}; change one of them."]
        return [*super().problems(), *(extra if odd else [])]

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Check that blocks fill every layer."""
        options: Any = self
        check_divides("gralora_k", options.gralora_k, inputs(shapes), "inputs")
        check_divides("gralora_k", options.gralora_k, outputs(shapes), "outputs")
        return {}
