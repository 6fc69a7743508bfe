"""`adapter: {type: c3a}`: circular convolutions of blocks, which are matrices of full rank with few numbers."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import POSITIVE, SIZES, Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes, both, check_divides, largest_common
from ludwig_peft_plugin.adapters.targets import matches_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_BLOCK = 128


@peft_method("c3a", replace=True)
class C3AConfig(PeftMethod):
    r"""C3A, Chen et al. 2024 (https://arxiv.org/abs/2407.19342).

    A layer computes `W x + C x / in`, where C of shape [out, in] consists of circulant blocks [b, b]: each is given by
    its first column, so C has `in * out / b` numbers and any rank up to the full one. The product is a convolution,
    computed by FFT in float32.

    PEFT draws the kernels at random, which changes the model; here they start at zero by default, so the adapted model
    starts as the base. The block size is the largest power of two up to 128 that divides the inputs and outputs of all
    adapted layers, unless one is given. Kernels are divided by the number of inputs, which is why the learning rate is
    high (the paper's are 0.01 to 0.4).
    """

    paper: ClassVar[str] = "Chen et al. 2024, https://arxiv.org/abs/2407.19342"
    good_for: ClassVar[str] = "full-rank updates with LoRA's number of parameters"
    learning_rate: ClassVar[float | None] = 5e-2
    peft_type: ClassVar[str] = "C3A"
    title: ClassVar[str] = "C3A"
    summary: ClassVar[str] = (
        "Trains block-circular convolutions beside each weight: updates of full rank from few numbers."
    )
    renamed: ClassVar[dict[str, str]] = {"bias": "bias_type"}
    defaults: ClassVar[dict[str, Any]] = {"block_size": None, "init_weights": True}
    values: ClassVar[dict[str, Values]] = {
        "block_size": POSITIVE,
        "block_size_pattern": SIZES.or_null(),
        "init_weights": one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    }
    texts: ClassVar[dict[str, str]] = {
        "block_size": "Size of the circulant blocks; divides the inputs and outputs of every adapted layer. Larger "
        "blocks mean fewer parameters. Null takes the largest power of two up to 128 that fits.",
        "block_size_pattern": "Block sizes that differ from `block_size`: by the end of a module's name, or an "
        "expression for it. Example: `{k_proj: 16}`.",
        "init_weights": "How kernels start: `true` at zero, or `gaussian`, `kaiming_uniform`, `xavier_uniform` (also "
        "`false`), which change the model before it is trained.",
    }

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the block size, and check those given."""
        options: Any = self
        patterns = options.block_size_pattern or {}
        sizes, rest = both(shapes), {}
        for name, size in sizes.items():
            key = next((key for key in patterns if matches_pattern(name, key)), None)
            if key is None:
                rest[name] = size
            else:
                check_divides("block_size_pattern", patterns[key], {name: size}, "inputs and outputs")
        block = options.block_size or largest_common(rest, LARGEST_BLOCK)
        check_divides("block_size", block, rest, "inputs and outputs")
        return {"block_size": block}
