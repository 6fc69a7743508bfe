"""`adapter: {type: miss}`: one small matrix per layer, applied to sums of the input's parts."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes, both, check_divides, inputs, outputs
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("miss")
class MissConfig(PeftMethod):
    r"""MiSS, Kang and Yin 2024 (https://arxiv.org/abs/2409.15371).

    The input is cut into parts of length r, which are added up; a layer computes `W x + D^T sum_p x_p` with one trained
    matrix D of shape [r, out], which starts at zero, so the adapted model starts as the base. As many parameters as a
    LoRA of rank `r out / (in + out)`.

    Two other forms: `init_weights: bat` multiplies D with blocks of the weight (which is dequantised for it where it is
    quantised), `mini` shares D among `mini_r` parts of the output. Rank 64 as in PEFT and the paper.
    """

    paper: ClassVar[str] = "Kang and Yin 2024, https://arxiv.org/abs/2409.15371"
    good_for: ClassVar[str] = "fast training with little memory"
    learning_rate: ClassVar[float | None] = 3e-4
    peft_type: ClassVar[str] = "MISS"
    title: ClassVar[str] = "MiSS"
    summary: ClassVar[str] = "Trains one small matrix per layer that is applied to sums of the input's parts."
    values: ClassVar[dict[str, Values]] = {"init_weights": one_of(True, False, "bat", "mini")}
    texts: ClassVar[dict[str, str]] = {
        "r": "Length of the parts the input is cut into. Larger is more parameters.",
        "mini_r": "With `init_weights: mini`, width of the matrix; divides the outputs of every adapted layer.",
        "miss_dropout": "Dropout on the input of the update while training.",
        "init_weights": "The form of the update: `true` for MiSS, `bat` or `mini`; `false` starts MiSS at random, "
        "which changes the model before it is trained.",
    }

    def problems(self) -> list[str]:
        """Refuse `mini_r` where it is not read."""
        options: Any = self
        idle = options.mini_r != 1 and options.init_weights != "mini"
        return [*super().problems(), *(["mini_r has no effect without init_weights: mini."] if idle else [])]

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Check that parts fill every layer, where the form needs it."""
        options: Any = self
        name, smallest = min(inputs(shapes).items(), key=lambda entry: entry[1])
        if options.r > smallest:
            raise AdapterError(f"adapter.r: {options.r} is more than the {smallest} inputs of {name!r}; give fewer.")
        if options.init_weights == "bat":
            check_divides("r", options.r, both(shapes), "inputs and outputs")
        if options.init_weights == "mini":
            check_divides("mini_r", options.mini_r, outputs(shapes), "outputs")
        return {}
