"""`adapter: {type: oft}`: weights rotated by block-diagonal orthogonal matrices."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, Values
from ludwig_peft_plugin.adapters.shapes import Shapes, check_divides, inputs, largest_common

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 32


@peft_method("oft", replace=True)
class OftConfig(PeftMethod):
    r"""OFT, Qiu et al. 2023 (https://arxiv.org/abs/2306.07280), applied to the input (OFT v2, arXiv 2506.19847).

    A layer computes `W (R x)`, with R of shape [in, in] block-diagonal, its blocks [b, b] orthogonal: each is the
    Cayley transform `(I + Q)(I - Q)^-1` of a trained skew-symmetric Q. Q starts at zero, so the adapted model starts as
    the base. As R meets the input, the base's weight is used as it is, quantised or not.

    By default the inverse is `num_cayley_neumann_terms` terms of its Neumann series, which is orthogonal up to their
    error. The block size is 32 as in PEFT, or the largest smaller power of two that divides all inputs.
    """

    paper: ClassVar[str] = "Qiu et al. 2023, https://arxiv.org/abs/2306.07280"
    good_for: ClassVar[str] = "keeping what the base knows, also on quantised bases"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "OFT"
    title: ClassVar[str] = "OFT"
    summary: ClassVar[str] = "Rotates the input of each weight by trained blocks, which keeps angles among neurons."
    defaults: ClassVar[dict[str, Any]] = {"oft_block_size": None}
    values: ClassVar[dict[str, Values]] = {
        "r": NOT_NEGATIVE,
        "oft_block_size": POSITIVE,
        "eps": ABOVE_ZERO,
        "module_dropout": Values({"enum": [0.0]}, "0: PEFT's OFT never applies its dropout"),
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Number of blocks per layer, instead of their size. 0 leaves it to `oft_block_size`.",
        "oft_block_size": "Size of the rotated blocks; divides the inputs of every adapted layer. Larger blocks mean "
        "more parameters. Null is 32 where that divides all inputs.",
        "module_dropout": "Of Ludwig's own type; 0.",
        "coft": "Whether Q is kept within `eps` of zero (constrained OFT).",
        "eps": "How far `coft` lets blocks turn.",
        "block_share": "Whether the blocks of a layer are one and the same.",
        "use_cayley_neumann": "Whether the inverse is approximated by a series, which is faster than solving.",
        "num_cayley_neumann_terms": "Terms of that series.",
    }

    def problems(self) -> list[str]:
        """Refuse a size and a number of blocks together, and options that others leave without an effect."""
        options: Any = self
        both = options.r and options.oft_block_size
        extra = ["r and oft_block_size say the same in two ways; give one of them."] if both else []
        if not options.coft:
            extra += self.idle("coft: true", "eps")
        if not options.use_cayley_neumann:
            extra += self.idle("use_cayley_neumann: true", "num_cayley_neumann_terms")
        return [*super().problems(), *extra]

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.OFTConfig`, whose default size would contradict a number of blocks."""
        options: Any = self
        return super().peft_arguments() | ({"oft_block_size": 0} if options.r else {})

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the block size, and check those given."""
        options: Any = self
        sizes = inputs(shapes)
        if options.r:
            check_divides("r", options.r, sizes, "inputs")
            return {}
        block = options.oft_block_size or largest_common(sizes, BLOCK)
        check_divides("oft_block_size", block, sizes, "inputs")
        return {"oft_block_size": block}
