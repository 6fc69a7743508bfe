"""`adapter: {type: bitfit}`: only biases are trained."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, register
from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.selective import BitFitConfig as PeftBitFitConfig
from ludwig_peft_plugin.adapters.selective.base_model import base_parameters, is_bias
from ludwig_peft_plugin.adapters.selective.options import EXPECTS_NAMES, NULL, PATTERN_OR_NAMES, check_expression

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("bitfit")
class BitFitConfig(AdapterConfig):
    """BitFit, Ben Zaken et al. 2021 (https://arxiv.org/abs/2106.10199).

    A layer computes `W x + b'` with W of shape [out, in] frozen and the bias b' of shape [out] trained; biases of
    normalisations are trained too. b' starts as the base's bias (zero with `create`), so the model starts as the base.

    The paper trains all biases with learning rates of 1e-4 to 1e-3. Models of the Llama kind have none: there `create`
    is needed. Biases are never quantised, so 4- and 8-bit bases work.
    """

    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199"
    good_for: ClassVar[str] = "small data on a base with biases; the smallest adapters"
    learning_rate: ClassVar[float | None] = 3e-3
    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    peft_module: ClassVar[str | None] = "ludwig_peft_plugin.adapters.selective"

    type: str = schema_utils.ProtectedString("bitfit", description="Training of biases (BitFit).")
    create: bool = schema_utils.Boolean(
        default=False,
        description="Whether linear layers without a bias get one that starts at zero (not the output head). Llama and "
        "its like have no biases at all. Such an adapter is exported by itself: their architectures have no place for "
        "biases to merge into.",
    )
    target_modules: list[str] | str | None = option(
        {"anyOf": [*PATTERN_OR_NAMES, NULL]},
        EXPECTS_NAMES,
        "The modules whose biases are trained: names, each of which matches every module whose dotted name ends in it, "
        "or a regular expression over full names. Null is all.",
    )

    def __post_init__(self) -> None:
        """Refuse an expression that is none."""
        check_expression("target_modules", self.target_modules)

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> PeftBitFitConfig:
        """Return the PEFT config; `kwargs` have no effect."""
        return PeftBitFitConfig(task_type=task_type, create=self.create, bias_modules=self.target_modules)

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return why this adapter could not be merged into `base`, None if it can."""
        if not self.create:
            return None
        existing = {name for name, _, own_name, _ in base_parameters(base) if is_bias(own_name)}
        if set(self.to_config().choose(base)) <= existing:
            return None
        return "adapter.create: true adds biases that the base's architecture has no place for; they cannot be merged."

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "BitFit"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains only the biases: under 0.1% of the parameters, no cost at inference. Needs a base with biases, or "
            "`create: true`. Works on full-precision, 8-bit and 4-bit bases."
        )
