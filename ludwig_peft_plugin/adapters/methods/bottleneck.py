"""`adapter: {type: bottleneck}`: small two-layer networks between the base's layers (Houlsby, Pfeiffer, parallel)."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, Batches, register
from ludwig_peft_plugin.adapters.bottleneck.config import (
    ARCHITECTURES,
    DEFAULT_REDUCTION,
    INITIALISATIONS,
    LEARNED_SCALINGS,
    NON_LINEARITIES,
)
from ludwig_peft_plugin.adapters.fields import option

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

NULL = {"type": "null"}
FACTOR = {"type": "number", "exclusiveMinimum": 0}
FACTORS = {"type": "object", "patternProperties": {"^([0-9]+|default)$": FACTOR}, "additionalProperties": False}


def _switch(description: str) -> Any:
    """Return a field that is true, false, or what the architecture says."""
    return option({"type": ["boolean", "null"]}, "true, false or null", f"{description} Null is the architecture's.")


@register("bottleneck")
class BottleneckAdapterConfig(AdapterConfig):
    r"""Bottleneck adapters: Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) and what followed.

    An adapter computes `f(z) = s (U sigma(D z + d) + u)`, with D of shape [b, hidden] and U of shape [hidden, b]
    trained; b is the hidden size divided by `reduction_factor`. With h the output of a sub-block (attention or
    feed-forward) and x its input before the norm, the block goes on with

        houlsby   x + h + f(h)        after attention and after the feed-forward layers
        pfeiffer  x + h + f(x + h)    after the feed-forward layers; Pfeiffer et al. 2021, arXiv 2005.00247
        parallel  x + h + f(x)        beside the feed-forward layers; He et al. 2022, arXiv 2110.04366

    (in BERT, whose norm comes after the addition, pfeiffer reads `LN(x + h)`). `pfeiffer` is the default: it has half
    of houlsby's weights and steps, and in that paper's comparison of placements about its quality.

    U starts at zero, so that the adapted model starts as its base exactly. The papers' normal weights (`bert`,
    `houlsby`) are near it only as long as hidden states and sizes are small. Weights are float32 on any base.
    """

    family: ClassVar[str] = "additive"
    paper: ClassVar[str] = "Houlsby et al. 2019, https://arxiv.org/abs/1902.00751"
    good_for: ClassVar[str] = "a non-linear change; adapters to share with AdapterHub"
    starts_as_base: ClassVar[bool] = True
    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    learning_rate: ClassVar[float | None] = 1e-3
    aliases: ClassVar[tuple[str, ...]] = ("adapter",)
    peft_module: ClassVar[str | None] = "ludwig_peft_plugin.adapters.bottleneck"

    type: str = schema_utils.ProtectedString("bottleneck", description="Bottleneck adapters.")
    architecture: str = schema_utils.StringOptions(
        options=list(ARCHITECTURES),
        default="pfeiffer",
        description="Where adapters lie and what they read: `houlsby` after attention and after the feed-forward "
        "layers, `pfeiffer` after the latter only, on the sum with the block's input, `parallel` beside them. It "
        "decides the options that are left null.",
    )
    reduction_factor: float | dict[str, float] | None = option(
        {"anyOf": [FACTOR, FACTORS, NULL]},
        "a number above 0, or a mapping from layer numbers and `default` to such numbers",
        "The hidden size divided by the bottleneck's, or one for each layer. Example: `{0: 4, default: 16}`. Null is "
        f"{DEFAULT_REDUCTION:g}, unless `bottleneck_size` is given.",
    )
    bottleneck_size: int | None = schema_utils.PositiveInteger(
        default=None, allow_none=True, description="The size of the bottleneck, in place of `reduction_factor`."
    )
    non_linearity: str | None = schema_utils.StringOptions(
        options=list(NON_LINEARITIES),
        default=None,
        allow_none=True,
        description="The activation in the bottleneck. Null is the architecture's: relu, for houlsby swish.",
    )
    scaling: float | str | None = option(
        {"anyOf": [{"type": "number"}, {"enum": list(LEARNED_SCALINGS)}, NULL]},
        "a number, learned or channel",
        "What the adapter's change is multiplied by: a number, one that is trained from 1 on (`learned`), or one for "
        "each hidden dimension (`channel`). Null is the architecture's: 1, for parallel 4.",
    )
    dropout: float = schema_utils.NonNegativeFloat(
        default=0.0, max=1.0, description="Dropout on the adapter's change while training."
    )
    mh_adapter: bool | None = _switch("Whether there are adapters after attention.")
    output_adapter: bool | None = _switch("Whether there are adapters after the feed-forward layers.")
    is_parallel: bool | None = _switch("Whether adapters read the sub-block's input instead of its output.")
    ln_before: bool = schema_utils.Boolean(
        default=False,
        description="A new layer norm on what the adapter reads. Useful with pfeiffer and parallel on decoders, whose "
        "hidden states grow from layer to layer.",
    )
    ln_after: bool = schema_utils.Boolean(default=False, description="A new layer norm on the adapter's change.")
    adapter_residual_before_ln: bool = schema_utils.Boolean(
        default=False,
        description="With `ln_after`: the adapter's input is added before that norm, so that the model does not start "
        "as its base.",
    )
    original_ln_before: bool | None = _switch(
        "Whether adapters read the sum with the block's input (through the base's norm where one follows), not the "
        "sub-block's output alone."
    )
    original_ln_after: bool = schema_utils.Boolean(
        default=True,
        description="Whether the block's input is added to the adapter's output. False needs `original_ln_before: "
        "true` and `residual_before_ln: false` or `post_add`; not for models that normalise after each sub-block.",
    )
    residual_before_ln: bool | str | None = option(
        {"enum": [True, False, "post_add", None]},
        "true, false, post_add or null",
        "With `original_ln_before`: what the adapter's change is added to: the sub-block's output (true, and null), "
        "that plus the block's input (`post_add`), or this after the base's norm (false).",
    )
    leave_out: list[int] | None = option(
        {"anyOf": [{"type": "array", "items": {"type": "integer", "minimum": 0}}, NULL]},
        "a list of layer numbers, from 0",
        "Layers without an adapter. Example: `[0, 1]`.",
    )
    init_weights: str = schema_utils.StringOptions(
        options=list(INITIALISATIONS),
        default="mam_adapter",
        description="How weights start: `mam_adapter` with a second projection of zero, so that nothing changes at "
        "first; `bert` normal with deviation 0.02; `houlsby` normal with deviation 0.01, cut at 0.02.",
    )

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "Bottleneck adapter"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains small two-layer networks after (or beside) the base's sub-layers. They cost a little time at "
            "inference, as they cannot be merged. Reads and writes AdapterHub's folders. Any base, 4- and 8-bit too."
        )

    def __post_init__(self) -> None:
        """Refuse combinations in which an option would have no effect or nothing could be learned."""
        for problem in self._problems():
            raise ConfigValidationError(f"adapter.{problem}")

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftConfig":
        """Return the PEFT config; `kwargs` replace PEFT arguments and those PEFT does not know are ignored."""
        from ludwig_peft_plugin.adapters.bottleneck import BottleneckConfig

        names = set(BottleneckConfig.__dataclass_fields__)
        own = {name: getattr(self, name) for name in type(self).model_fields if name in names}
        arguments = {name: value for name, value in own.items() if value is not None}
        if isinstance(self.reduction_factor, dict):
            arguments["reduction_factor"] = {str(layer): factor for layer, factor in self.reduction_factor.items()}
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        return BottleneckConfig(task_type=task_type, **arguments)

    def build(self, base: "PreTrainedModel", batches: Batches | None) -> "PeftModel":
        """Put a new adapter on `base`; see `AdapterConfig.build`."""
        import ludwig_peft_plugin.adapters.bottleneck  # noqa: F401 (makes the type known to PEFT)

        return super().build(base, batches)

    def adapterhub_obstacle(self, model: "PeftModel") -> str | None:
        """Return why AdapterHub's library could not hold this adapter of `model`, None if it can."""
        from ludwig_peft_plugin.adapters.bottleneck.adapterhub import exchange_obstacle

        return exchange_obstacle(model)

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return why this adapter cannot be merged into `base`."""
        from ludwig_peft_plugin.adapters.bottleneck.layer import MERGE_REFUSAL

        return f"adapter.type: {self.type}: {MERGE_REFUSAL}"

    def _setting(self, name: str) -> Any:
        """Return an option's value, the architecture's where it is null."""
        value = getattr(self, name)
        return ARCHITECTURES[self.architecture].get(name) if value is None else value

    def _problems(self) -> list[str]:
        """Return what is wrong with the options, each problem beginning with an option's name."""
        problems = []
        before = self._setting("original_ln_before")
        parallel = self._setting("is_parallel")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            problems.append("reduction_factor has no effect beside bottleneck_size; remove one of them.")
        if not self._setting("mh_adapter") and not self._setting("output_adapter"):
            problems.append("mh_adapter and output_adapter are both false, so there is no adapter; set one of them.")
        if parallel and before:
            problems.append(
                "original_ln_before has no effect with is_parallel: true, which reads the sub-block's input; remove it."
            )
        if self.residual_before_ln is not None and (parallel or not before):
            problems.append("residual_before_ln has no effect without original_ln_before: true; set that or remove it.")
        if self.adapter_residual_before_ln and (parallel or not self.ln_after):
            problems.append(
                "adapter_residual_before_ln has no effect without ln_after: true, or with parallel adapters; remove it."
            )
        if not self.original_ln_after and (parallel or not before or self.residual_before_ln in (None, True)):
            problems.append(
                "original_ln_after: false would drop the block's input, without which the model computes nothing of "
                "use; it needs original_ln_before: true and residual_before_ln: false or post_add."
            )
        return problems
