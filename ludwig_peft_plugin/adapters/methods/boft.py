"""`adapter: {type: boft}`: weights rotated by products of sparse orthogonal matrices."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import NOT_NEGATIVE, POSITIVE, Values
from ludwig_peft_plugin.adapters.shapes import Shapes, check_divides, inputs, largest_common

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 4


@peft_method("boft", replace=True)
class BoftConfig(PeftMethod):
    r"""BOFT, Liu et al. 2023 (https://arxiv.org/abs/2311.06243).

    A layer computes `s * (W R) x`, with R of shape [in, in] orthogonal and s of shape [out] a trained scale. R is a
    product of `boft_n_butterfly_factor` block-diagonal rotations of blocks [b, b] with permutations between them, each
    block the Cayley transform of a trained skew-symmetric matrix. They start at zero, R as the identity and s at one,
    so the adapted model starts as the base.

    Each layer keeps permutations of size [in, in], and every forward pass multiplies W with R: `oft` gives much of the
    same at a lower cost. The block size is 4 as in PEFT, or the largest smaller power of two that divides all inputs.
    """

    paper: ClassVar[str] = "Liu et al. 2023, https://arxiv.org/abs/2311.06243"
    good_for: ClassVar[str] = "keeping what the base knows; slow and large in memory"
    learning_rate: ClassVar[float | None] = 2e-3
    peft_type: ClassVar[str] = "BOFT"
    title: ClassVar[str] = "BOFT"
    summary: ClassVar[str] = "Rotates weights by products of sparse orthogonal matrices, which keeps angles among them."
    defaults: ClassVar[dict[str, Any]] = {"boft_block_size": None, "boft_block_num": None}
    values: ClassVar[dict[str, Values]] = {"boft_block_size": POSITIVE, "boft_block_num": NOT_NEGATIVE}
    texts: ClassVar[dict[str, str]] = {
        "boft_block_size": "Size of the rotated blocks; divides the inputs of every adapted layer. Larger blocks mean "
        "more parameters. Null is 4 where that divides all inputs.",
        "boft_block_num": "Blocks per layer, instead of their size. Null or 0 leaves it to `boft_block_size`.",
        "boft_n_butterfly_factor": "Rotations whose product is R. Each further one doubles how far a block reaches.",
        "boft_dropout": "Share of blocks that stay unrotated in a training step.",
    }

    def problems(self) -> list[str]:
        """Refuse a size and a number of blocks together."""
        options: Any = self
        both = options.boft_block_num and options.boft_block_size
        extra = ["boft_block_num and boft_block_size say the same in two ways; give one of them."] if both else []
        return [*super().problems(), *extra]

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.BOFTConfig`, whose default size would contradict a number of blocks."""
        options: Any = self
        return super().peft_arguments() | ({"boft_block_size": 0} if options.boft_block_num else {})

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the block size, and check those given."""
        options: Any = self
        sizes, reach = inputs(shapes), 2 ** (options.boft_n_butterfly_factor - 1)
        if options.boft_block_num:
            check_divides("boft_block_num", options.boft_block_num, sizes, "inputs")
            return {}
        block = options.boft_block_size or largest_common(sizes, BLOCK)
        check_divides("boft_block_size", block, sizes, "inputs")
        check_divides("boft_n_butterfly_factor", block * reach, sizes, "inputs (block size times 2^(factor - 1))")
        return {"boft_block_size": block, "boft_block_num": 0}

    @classmethod
    def building(cls) -> AbstractContextManager[None]:
        """Have PEFT compute blocks without its CUDA extension."""
        from ludwig_peft_plugin.adapters.boft_blocks import compute_without_extension

        compute_without_extension()
        return nullcontext()
