"""`adapter: {type: vblora}`: LoRA matrices put together from a bank of vectors that all layers share."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, POSITIVE, Values
from ludwig_peft_plugin.adapters.shapes import Shapes, both, check_divides, largest_common

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 256


@peft_method("vblora", replace=True)
class VBLoRAConfig(PeftMethod):
    r"""VB-LoRA, Li et al. 2024 (https://arxiv.org/abs/2405.15179).

    A layer computes `W x + B A x`. Rows of A and columns of B are cut into parts of `vector_length`; each part is a
    mixture of the `topk` vectors of a bank of `num_vectors`, by the softmax of trained logits. The bank is trained too
    and shared by all layers. It starts at small random numbers, so the adapted model starts near the base and not
    exactly at it.

    Most parameters are logits, `num_vectors` for each part; with `save_only_topk_weights` a file holds the chosen ones
    alone, and cannot be trained further. The vector length is the largest power of two up to 256 that divides the
    inputs and outputs of all adapted layers, unless one is given.
    """

    paper: ClassVar[str] = "Li et al. 2024, https://arxiv.org/abs/2405.15179"
    good_for: ClassVar[str] = "tiny files for many adapters"
    learning_rate: ClassVar[float | None] = 1e-2
    starts_as_base: ClassVar[bool] = False
    peft_type: ClassVar[str] = "VBLORA"
    title: ClassVar[str] = "VB-LoRA"
    summary: ClassVar[str] = "Puts LoRA matrices together from a bank of trained vectors that all layers share."
    defaults: ClassVar[dict[str, Any]] = {"vector_length": None}
    values: ClassVar[dict[str, Values]] = {
        "vector_length": POSITIVE,
        "init_vector_bank_bound": ABOVE_ZERO,
        "init_logits_std": ABOVE_ZERO,
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank of the update.",
        "num_vectors": "Vectors in the bank; at least `topk`.",
        "vector_length": "Length of the bank's vectors; divides the inputs and outputs of every adapted layer. Null is "
        "the largest power of two up to 256 that fits.",
        "topk": "Vectors that are mixed for a part.",
        "save_only_topk_weights": "Whether a file holds only the chosen vectors' weights. It is much smaller and can "
        "only be used, not trained further or resumed from.",
        "vblora_dropout": "Dropout on the input of the update while training.",
        "init_vector_bank_bound": "Largest number the bank starts with.",
        "init_logits_std": "Spread of the logits at the start.",
    }

    def problems(self) -> list[str]:
        """Refuse to mix more vectors than there are."""
        options: Any = self
        short = options.topk > options.num_vectors
        extra = [f"topk: {options.topk} is more than num_vectors: {options.num_vectors}."] if short else []
        return [*super().problems(), *extra]

    @classmethod
    def without_data(cls) -> AbstractContextManager[None]:
        """Find no infinite logit, of which PEFT asks whether there is any before each training step."""
        import torch

        from ludwig_peft_plugin.estimate.replace import replaced

        return replaced(torch.Tensor, {"isinf": lambda logits: torch.tensor(False)})

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the vectors' length, and check one that is given."""
        options: Any = self
        sizes = both(shapes)
        length = options.vector_length or largest_common(sizes, LONGEST)
        check_divides("vector_length", length, sizes, "inputs and outputs")
        return {"vector_length": length}
