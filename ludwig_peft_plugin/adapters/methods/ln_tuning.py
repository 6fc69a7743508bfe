"""`adapter: {type: ln_tuning}`: only normalisations are trained, in place of Ludwig's own type of that name."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, register
from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.selective.options import EXPECTS_NAMES, NULL, PATTERN_OR_NAMES, check_expression

if TYPE_CHECKING:
    from peft import LNTuningConfig as PeftLNTuningConfig


@register("ln_tuning", replace=True)
class LNTuningConfig(AdapterConfig):
    """LN tuning, Zhao et al. 2023 (https://arxiv.org/abs/2312.11420).

    A normalisation computes `g' * x / rms(x)` (RMSNorm) or `g' * (x - mean(x)) / std(x) + b'` (LayerNorm), with g' and
    b' of shape [hidden] trained. They start as the base's, so the model starts as the base.

    By default every normalisation with weights is trained, found by its class: those of the layers, of queries and
    keys, and the last one. The copies are float32. Accepts every config of Ludwig's own `ln_tuning`; saved adapters
    are in PEFT's own format.
    """

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "Zhao et al. 2023, https://arxiv.org/abs/2312.11420"
    good_for: ClassVar[str] = "a new tone or domain with tiny adapters, on any base"
    learning_rate: ClassVar[float | None] = 1e-2
    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    type: str = schema_utils.ProtectedString("ln_tuning", description="Training of normalisations (LN tuning).")
    target_modules: list[str] | str | None = option(
        {"anyOf": [*PATTERN_OR_NAMES, NULL]},
        EXPECTS_NAMES,
        "The normalisations that are trained: names, each of which matches every module whose dotted name ends in it, "
        "or a regular expression over full names. Null is all of the model.",
    )
    exclude_modules: list[str] | str | None = option(
        {"anyOf": [*PATTERN_OR_NAMES, NULL]},
        EXPECTS_NAMES,
        "Normalisations that `target_modules` matches but that stay frozen.",
    )

    def __post_init__(self) -> None:
        """Refuse expressions that are none."""
        check_expression("target_modules", self.target_modules)
        check_expression("exclude_modules", self.exclude_modules)

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftLNTuningConfig":
        """Return the `peft.LNTuningConfig`; `kwargs` have no effect."""
        from peft import LNTuningConfig

        import ludwig_peft_plugin.adapters.selective  # noqa: F401 (has PEFT keep the copies in float32)

        return LNTuningConfig(
            task_type=task_type, target_modules=self.target_modules, exclude_modules=self.exclude_modules
        )

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "LN tuning"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains only the normalisations: about 0.01% of the parameters of a large model, no cost at inference. "
            "Works on full-precision, 8-bit and 4-bit bases."
        )
