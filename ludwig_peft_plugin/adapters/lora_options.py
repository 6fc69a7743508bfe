"""The options that `lora`, `qlora` and `dora` share, and the PEFT config they make."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import AdapterConfig, Batches
from ludwig_peft_plugin.adapters.fields import option, section
from ludwig_peft_plugin.adapters.lora_fields import PEFT_FIELDS, SECTIONS
from ludwig_peft_plugin.adapters.lora_init import InitMethod, init_method
from ludwig_peft_plugin.adapters.lora_problems import init_problems, target_problems
from ludwig_peft_plugin.adapters.lora_sections import (
    CordaSection,
    EvaSection,
    LoftQSection,
    LoraGASection,
    peft_section,
)

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel
    from transformers import PreTrainedModel

BIAS_OPTIONS = ["none", "all", "lora_only"]
NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
LAYER = {"type": "integer", "minimum": 0}
NULL = {"type": "null"}
NEED_NOTHING = ("default", "random", "gaussian", "mica")
"""Values of `init_lora_weights` that need neither data nor the base's numbers."""


def target_modules_option(default: str | None) -> Any:
    """Return the field `target_modules` with a default of its own."""
    return option(
        {"anyOf": [NAMES, {"type": "string", "minLength": 1}, NULL]},
        "a list of module names, a regular expression over full module names, or all-linear",
        "What gets an adapter: a list of module names (each matches every module whose dotted name ends in it), a "
        "regular expression over full names, or `all-linear` (every linear layer but the output head). Null takes what "
        "PEFT has for the architecture, for Llama `q_proj` and `v_proj`.",
        default=default,
    )


class LoraOptions(AdapterConfig):
    r"""Low-rank adaptation of linear layers, Hu et al. 2021 (https://arxiv.org/abs/2106.09685).

    A layer with weight W of shape [out, in] computes `W x + s B A x`, with A of shape [r, in] and B of shape [out, r]
    trained and W frozen; `s` is `alpha / r`, with `use_rslora` `alpha / sqrt(r)`. B starts at zero, so the adapted
    model starts as the base. Adapter weights are float32, also over a bfloat16 or quantised base.
    """

    encoder: ClassVar[bool] = True
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    r: int = schema_utils.PositiveInteger(default=8, description="Rank of the update.")
    alpha: int | None = schema_utils.PositiveInteger(
        default=None, allow_none=True, description="Numerator of the update's scaling. Null is `2 * r`."
    )
    dropout: float = schema_utils.NonNegativeFloat(
        default=0.05, max=1.0, description="Dropout on the input of the update while training."
    )
    bias_type: str = schema_utils.StringOptions(
        options=BIAS_OPTIONS,
        default="none",
        description="Which of the base's biases are trained too: `none`, `all`, or those of adapted layers "
        "(`lora_only`).",
    )
    bias: str | None = schema_utils.StringOptions(
        options=BIAS_OPTIONS, default=None, allow_none=True, description="PEFT's name for `bias_type`; same meaning."
    )
    target_modules: list[str] | str | None = target_modules_option(default=None)
    exclude_modules: list[str] | str | None = option(
        {"anyOf": [NAMES, {"type": "string", "minLength": 1}, NULL]},
        "a list of module names or a regular expression over full module names",
        "What `target_modules` matches but gets no adapter: names or a regular expression, as there.",
    )
    layers_to_transform: list[int] | int | None = option(
        {"anyOf": [{"type": "array", "items": LAYER, "minItems": 1}, LAYER, NULL]},
        "a layer number or a list of them, from 0",
        "The layers that get an adapter. Null is all. Works with names and `all-linear`, not with an expression.",
    )
    layers_pattern: list[str] | str | None = option(
        {"anyOf": [NAMES, {"type": "string", "minLength": 1}, NULL]},
        "the name of the list of layers in the model, or several",
        "The name of the model's list of layers, for `layers_to_transform`, where it has several. Null takes any.",
    )
    rank_pattern: dict[str, int] | None = option(
        {"anyOf": [{"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}}, NULL]},
        "a mapping from module names to ranks of at least 1",
        "Ranks that differ from `r`: by the end of a module's name, or an expression for it. Example: `{k_proj: 4}`.",
    )
    alpha_pattern: dict[str, float] | None = option(
        {"anyOf": [{"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}, NULL]},
        "a mapping from module names to numbers above 0",
        "Values that differ from `alpha`, as in `rank_pattern`.",
    )
    modules_to_save: list[str] | None = option(
        {"anyOf": [NAMES, NULL]},
        "a list of module names",
        "Modules that are trained in full beside the adapter, and saved with it. Example: `[lm_head]`.",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        {"anyOf": [TOKENS, {"type": "object", "additionalProperties": TOKENS, "minProperties": 1}, NULL]},
        "a list of token ids, or a mapping from an embedding's name to one",
        "Tokens whose embeddings are trained beside the adapter.",
    )
    target_parameters: list[str] | None = option(
        {"anyOf": [NAMES, NULL]},
        "a list of parameter names",
        "Parameters (not modules) that get an adapter, as the stacked experts of a mixture. Needs `dropout: 0`.",
    )
    layer_replication: list[list[int]] | None = option(
        {"anyOf": [{"type": "array", "items": {**TOKENS, "minItems": 2, "maxItems": 2}, "minItems": 1}, NULL]},
        "a list of [first, end] layer numbers",
        "Builds a deeper model from ranges of the base's layers, whose weights are shared and whose adapters are not. "
        "Example: `[[0, 4], [2, 5]]` gives the layers 0 1 2 3 2 3 4.",
    )
    ensure_weight_tying: bool = schema_utils.Boolean(
        default=False,
        description="Whether an input embedding that is trained or adapted stays tied to the output head.",
    )
    use_rslora: bool = schema_utils.Boolean(
        default=False,
        description="Rank-stabilised LoRA: scaling `alpha / sqrt(r)` (https://arxiv.org/abs/2312.03732).",
    )
    lora_bias: bool = schema_utils.Boolean(
        default=False,
        description="Whether B has a bias. On layers without one of their own, the adapter cannot be merged then.",
    )
    loraplus_lr_ratio: float | None = option(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, NULL]},
        "a number above 0",
        "LoRA+: the learning rate of B, as a multiple of the others' (https://arxiv.org/abs/2402.12354; 2 to 16).",
    )
    init_lora_weights: str | bool = option(
        {
            "anyOf": [
                {"enum": ["default", "random", "gaussian", "orthogonal", "pissa", "olora", "mica", *SECTIONS]},
                {"type": "string", "pattern": "^pissa_niter_[0-9]+$"},
                {"type": "boolean"},
            ]
        },
        "one of default (true), random (false), gaussian, orthogonal, pissa, pissa_niter_<n>, olora, mica, eva, corda, "
        "lora_ga, loftq",
        "How A and B start. `default` (true): A uniform, B zero. `gaussian`: A normal, B zero. `random` (false): both "
        "random. `orthogonal`: both, with orthogonal rows. From the weights: `pissa` and `pissa_niter_<n>` "
        "(arXiv 2404.02948), `olora` (2406.01775), `mica` (2604.01694). From training batches: `eva` (2410.07170), "
        "`corda` (2406.05223), `lora_ga` (2407.05000). From the quantisation error: `loftq` (2310.08659).",
        default="default",
    )
    eva_config: EvaSection | None = section(EvaSection)
    corda_config: CordaSection | None = section(CordaSection)
    loftq_config: LoftQSection | None = section(LoftQSection)
    lora_ga_config: LoraGASection | None = section(LoraGASection)

    def __post_init__(self) -> None:
        """Fill in what follows from other options, and refuse combinations in which one would have no effect."""
        self.alpha = 2 * self.r if self.alpha is None else self.alpha
        if isinstance(self.init_lora_weights, bool):
            self.init_lora_weights = "default" if self.init_lora_weights else "random"
        if self.bias is not None and self.bias_type not in ("none", self.bias):
            raise ConfigValidationError(
                f"adapter.bias: {self.bias!r} and adapter.bias_type: {self.bias_type!r} are two names of one option "
                "with different values; keep one of them."
            )
        self.bias_type = self.bias or self.bias_type
        for problem in (*init_problems(self), *target_problems(self)):
            raise ConfigValidationError(f"adapter.{problem}")

    @property
    def uses_dora(self) -> bool:
        """Whether weights are decomposed into magnitude and direction."""
        return bool(getattr(self, "use_dora", False))

    @property
    def init(self) -> InitMethod:
        """The initialisation chosen with `init_lora_weights`."""
        return init_method(str(self.init_lora_weights))

    @property
    def needs_data(self) -> bool:
        """Whether the initialisation reads training batches (EVA, CorDA, LoRA-GA)."""
        return self.init.reads_data and not self.pretrained_adapter_weights

    def architecture_targets(self, model_type: str) -> list[str] | str | None:
        """Return the modules PEFT adapts in an architecture when none are given, None where it has no such list."""
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        targets: list[str] | str | None = DEFAULTS.get(model_type)
        return targets

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftLoraConfig":
        """Return the `peft.LoraConfig`; `kwargs` replace PEFT arguments and those PEFT does not know are ignored."""
        from peft import LoraConfig

        arguments = self.peft_arguments()
        arguments |= {name: value for name, value in kwargs.items() if name in PEFT_FIELDS}
        chosen = SECTIONS.get(arguments["init_lora_weights"])
        for name in SECTIONS.values():
            if name != chosen:
                del arguments[name]  # PEFT warns about a section that its initialisation does not read
        return LoraConfig(task_type=task_type, **arguments)

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`, by PEFT's names."""
        from peft import EvaConfig, LoraGAConfig
        from peft.tuners.lora.config import CordaConfig

        arguments: dict[str, Any] = {
            field: getattr(self, name) for field, name in PEFT_FIELDS.items() if name in type(self).model_fields
        }
        pairs = self.layer_replication
        bits, iterations = (self.loftq_config.loftq_bits, 1) if self.loftq_config else (None, 1)
        return arguments | {
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "layer_replication": None if pairs is None else [(first, end) for first, end in pairs],
            "init_lora_weights": {"default": True, "random": False}.get(
                str(self.init_lora_weights), self.init_lora_weights
            ),
            "eva_config": peft_section(self.eva_config, EvaConfig),
            "corda_config": peft_section(self.corda_config, CordaConfig),
            "lora_ga_config": peft_section(self.lora_ga_config, LoraGAConfig),
            "loftq_config": {"loftq_bits": bits or 4, "loftq_iter": iterations},
        }

    def build(self, base: "PreTrainedModel", batches: Batches | None) -> "PeftModel":
        """Put a new adapter on `base` and initialise it; see `AdapterConfig.build`."""
        from ludwig_peft_plugin.adapters.lora_build import build_lora

        return build_lora(base, self, batches)

    def start_plainly(self) -> None:
        """Start from now on without data and without the base's numbers; see `AdapterConfig.start_plainly`."""
        if self.init_lora_weights not in NEED_NOTHING:
            self.init_lora_weights = "default"
            self.eva_config = self.corda_config = self.loftq_config = self.lora_ga_config = None
        if getattr(self, "ephemeral_gpu_offload", False):
            self.ephemeral_gpu_offload = False

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return why this adapter could not be merged into `base`, None if it can."""
        from ludwig_peft_plugin.adapters.lora_checks import merge_obstacle

        return merge_obstacle(base, self)

    def sharing_obstacle(self) -> str | None:
        """Return why this adapter cannot be on one base with others, None if it can."""
        if self.init.changes_base and not self.pretrained_adapter_weights:
            return (
                f"init_lora_weights: {self.init_lora_weights} changes the base's weights, which the adapters share; "
                "use default, or train it alone (adapter: ...)"
            )
        if self.layer_replication:
            return "layer_replication makes another base of it, which the adapters share; train it alone (adapter: ...)"
        if self.bias_type != "none":
            return f"bias_type: {self.bias_type} trains the base's biases, which the adapters share; use none"
        return None
