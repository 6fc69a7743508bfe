"""`adapter: {type: layers}`: the weights of chosen layers are trained in full, the rest is frozen."""

from typing import Any, ClassVar

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, register
from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.selective import SelectedLayersConfig
from ludwig_peft_plugin.adapters.selective.options import NULL, check_expression

CHOICES = ("last", "first", "range", "pattern")
DEFAULT_LAST = 2


@register("layers")
class LayersConfig(AdapterConfig):
    """Training of some layers' weights, Lee et al. 2019 (https://arxiv.org/abs/1911.03090).

    The chosen parameters W become W' of the same shapes, all others stay: `h = f(x; W')`. W' starts as W, so the model
    starts as the base. A float32 copy is trained beside each frozen original, which `disable` and other adapters go
    back to. Without a choice the last two layers are trained. A weight that is tied is trained as one in both places.
    """

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "Lee et al. 2019, https://arxiv.org/abs/1911.03090"
    good_for: ClassVar[str] = "more capacity than an adapter, less memory than full fine-tuning"
    learning_rate: ClassVar[float | None] = 2e-4
    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    peft_module: ClassVar[str | None] = "ludwig_peft_plugin.adapters.selective"

    type: str = schema_utils.ProtectedString("layers", description="Training of the weights of chosen layers.")
    last: int | None = schema_utils.PositiveInteger(
        default=None,
        allow_none=True,
        description="Train this many layers up to the output. Null, with no other choice given, is 2.",
    )
    first: int | None = schema_utils.PositiveInteger(
        default=None, allow_none=True, description="Train this many layers from the input on."
    )
    range: list[int] | None = option(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
                NULL,
            ]
        },
        "[first layer, end], two layer numbers from 0 of which the second is past the last one",
        "Train these layers: `[4, 8]` is layers 4 to 7, counted from 0.",
    )
    pattern: str | None = option(
        {"anyOf": [{"type": "string", "minLength": 1}, NULL]},
        "a regular expression over full parameter names",
        "Train the parameters whose full name matches this regular expression, as `.*mlp.*` or `lm_head.weight`.",
    )
    include_head: bool = schema_utils.Boolean(
        default=False,
        description="Whether the output head is trained beside the layers. One that is tied to the input embedding is "
        "trained as one with it.",
    )

    def __post_init__(self) -> None:
        """Fill in the default choice; refuse more than one, and those that are empty."""
        given = [name for name in CHOICES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigValidationError(
                f"adapter.{given[1]}: {given[0]} says already which layers are trained; keep one of {', '.join(given)}."
            )
        if not given:
            self.last = DEFAULT_LAST
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ConfigValidationError(
                f"adapter.range: {self.range} is empty; the second number is past the last layer, as in [4, 8]."
            )
        if self.pattern is not None and self.include_head:
            raise ConfigValidationError(
                "adapter.include_head has no effect beside pattern; match the head there, as `.*mlp.*|lm_head.*`."
            )
        check_expression("pattern", self.pattern)

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> SelectedLayersConfig:
        """Return the PEFT config; `kwargs` have no effect."""
        return SelectedLayersConfig(
            task_type=task_type,
            first=self.first,
            last=self.last,
            layer_range=self.range,
            pattern=self.pattern,
            include_head=self.include_head,
        )

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "Layers"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains the weights of some layers in full: the last ones, the first ones, a range, or what an expression "
            "matches. No cost at inference once merged. Quantised weights cannot be trained."
        )
