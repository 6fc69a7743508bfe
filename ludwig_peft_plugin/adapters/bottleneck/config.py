"""The PEFT config of bottleneck adapters, and the three published arrangements of their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ludwig_peft_plugin.adapters.peft_type import peft_type

NAME = "BOTTLENECK"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "pfeiffer": {
        "mh_adapter": False,
        "output_adapter": True,
        "is_parallel": False,
        "original_ln_before": True,
        "non_linearity": "relu",
        "scaling": 1.0,
    },
    "houlsby": {
        "mh_adapter": True,
        "output_adapter": True,
        "is_parallel": False,
        "original_ln_before": False,
        "non_linearity": "swish",
        "scaling": 1.0,
    },
    "parallel": {
        "mh_adapter": False,
        "output_adapter": True,
        "is_parallel": True,
        "original_ln_before": False,
        "non_linearity": "relu",
        "scaling": 4.0,
    },
}
"""What each architecture stands for: Pfeiffer et al. 2021, Houlsby et al. 2019, He et al. 2022, with the values that
AdapterHub's configs `seq_bn`, `double_seq_bn` and `par_bn` give them (their reduction factors are 16, 16 and 2)."""

NON_LINEARITIES = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "leakyrelu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
"""transformers' activations without parameters of their own, and AdapterHub's spelling of `leaky_relu`."""

INITIALISATIONS = ("mam_adapter", "bert", "houlsby")
LEARNED_SCALINGS = ("learned", "channel")
DEFAULT_REDUCTION = 16.0


@dataclass
class BottleneckConfig(PeftConfig):
    """Options of a bottleneck adapter; None stands for what the architecture says.

    Attributes:
        architecture: `pfeiffer`, `houlsby` or `parallel`, which decides what other options leave open.
        reduction_factor: the hidden size divided by the bottleneck's, above 0, or one for each layer by its number
            (as text), with the rest under `default`.
        bottleneck_size: the size itself, in place of the factor.
        non_linearity: the activation between the two projections, one of `NON_LINEARITIES`.
        scaling: what the projection's output is multiplied by: a number, `learned` (a trained number that starts at
            1) or `channel` (one for each hidden dimension).
        dropout: on the scaled output, while training.
        mh_adapter: adapters after attention.
        output_adapter: adapters after the feed-forward layers.
        is_parallel: the adapter reads the sub-block's input instead of its output.
        ln_before: a new layer norm before the first projection.
        ln_after: a new layer norm after the second.
        adapter_residual_before_ln: with `ln_after`, whether the adapter's input is added before that norm.
        original_ln_before: whether the block's residual connection (and its norm, where that comes after) is applied
            before the adapter reads its input.
        original_ln_after: whether they are applied after the adapter.
        residual_before_ln: with `original_ln_before`, what is added to the adapter's output: the sub-block's output
            (True), that plus the residual connection (`post_add`), or this after its norm (False).
        leave_out: numbers of layers without an adapter, from 0.
        init_weights: `mam_adapter` (first projection uniform, second zero), `bert` (both normal, deviation 0.02) or
            `houlsby` (both normal, deviation 0.01, cut at two deviations).

    Raises:
        ValueError: an unknown value.
    """

    architecture: str = "pfeiffer"
    reduction_factor: float | dict[str, float] | None = None
    bottleneck_size: int | None = None
    non_linearity: str | None = None
    scaling: float | str | None = None
    dropout: float = 0.0
    mh_adapter: bool | None = None
    output_adapter: bool | None = None
    is_parallel: bool | None = None
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    original_ln_before: bool | None = None
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    leave_out: list[int] = field(default_factory=list)
    init_weights: str = "mam_adapter"

    def __post_init__(self) -> None:
        """Fill in what the architecture decides and check the values."""
        super().__post_init__()
        self.peft_type = peft_type(NAME)
        # PEFT asks every layer method for these; where adapters go follows from the model's structure instead.
        self.target_modules = self.exclude_modules = None
        _one_of("architecture", self.architecture, tuple(ARCHITECTURES))
        for name, value in ARCHITECTURES[self.architecture].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.reduction_factor is None and self.bottleneck_size is None:
            self.reduction_factor = DEFAULT_REDUCTION
        _one_of("non_linearity", str(self.non_linearity), NON_LINEARITIES)
        _one_of("init_weights", self.init_weights, INITIALISATIONS)
        if self.residual_before_ln not in (True, False, "post_add"):
            raise ValueError(f"residual_before_ln: {self.residual_before_ln!r} is none of true, false and post_add.")
        if isinstance(self.scaling, str):
            _one_of("scaling", self.scaling, LEARNED_SCALINGS)
        if not (self.mh_adapter or self.output_adapter):
            raise ValueError("mh_adapter and output_adapter are both false, so there is no adapter; set one of them.")

    def size(self, hidden: int, layer: int) -> int:
        """Return the bottleneck's size in a layer of `hidden` dimensions, at least 1.

        Raises:
            ValueError: `reduction_factor` is a mapping that says nothing about the layer.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        factor: Any = self.reduction_factor
        if isinstance(factor, dict):
            if str(layer) not in factor and "default" not in factor:
                raise ValueError(f"reduction_factor: says nothing about layer {layer}; add it, or `default`.")
            factor = factor.get(str(layer), factor.get("default"))
        return max(1, int(hidden // factor))


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option}: {value!r} is none of {', '.join(known)}.")
