"""`adapter: {type: adalora}`: low-rank updates whose ranks move to the layers where they matter most."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, ZERO_OR_MORE, Values, one_of

if TYPE_CHECKING:
    from peft import PeftModel

    from ludwig_peft_plugin.adapters.step_hooks import StepHooks

LORA_ONLY = "an option of LoRA that PEFT's AdaLoRA does not read"
UNTIL_TRAINED = 10_000
"""Steps that PEFT is told of before the length of the run is known; nothing reads them until then."""
OPEN_INTERVAL = Values(
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "a number between 0 and 1, both excluded"
)


@peft_method("adalora", replace=True)
class AdaLoraConfig(PeftMethod):
    r"""AdaLoRA, Zhang et al. 2023 (https://arxiv.org/abs/2303.10512).

    A layer computes `W x + (alpha / r) B diag(e) A x`, with A of shape [r, in], e of shape [r] and B of shape [out, r];
    e starts at zero, so the adapted model starts as the base. Every layer begins with rank `init_r`. After `tinit`
    steps, and until `tfinal` steps before the end, the components that matter least over all layers are switched off (e
    is set to zero), until `target_r` is left on average. How much a component matters is a running average of
    |weight x gradient| and of how much that varies. The loss gets `orth_reg_weight` times the mean of
    |A A^T - I| + |B^T B - I| (Frobenius norms), which keeps components apart.

    The number of steps is that of the run. Unless given, `tinit` is a tenth and `tfinal` a third of it, as in the
    paper's longer runs (PEFT's default is 0 for both, which never lets the final ranks settle).
    """

    paper: ClassVar[str] = "Zhang et al. 2023, https://arxiv.org/abs/2303.10512"
    good_for: ClassVar[str] = "a fixed budget of ranks, spent on the layers that need it"
    learning_rate: ClassVar[float | None] = 2e-3
    several: ClassVar[bool] = False
    peft_type: ClassVar[str] = "ADALORA"
    title: ClassVar[str] = "AdaLoRA"
    summary: ClassVar[str] = "LoRA whose ranks are taken from layers that need them least while it trains."
    renamed: ClassVar[dict[str, str]] = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "bias": "bias_type",
        "deltaT": "delta_t",
    }
    removed: ClassVar[dict[str, str]] = {
        "r": "PEFT ignores it: the rank starts at init_r; Ludwig's option r is another name of init_r here",
        "total_step": "the length of the run; Ludwig's option of that name is checked against it",
        "rank_pattern": "the result of training, not an option",
        "alpha_pattern": LORA_ONLY,
        "init_lora_weights": LORA_ONLY,
        "use_rslora": LORA_ONLY,
        "use_dora": LORA_ONLY,
        "loftq_config": LORA_ONLY,
        "eva_config": LORA_ONLY,
        "corda_config": LORA_ONLY,
        "lora_ga_config": LORA_ONLY,
        "velora_config": LORA_ONLY,
        "monteclora_config": LORA_ONLY,
        "kasa_config": LORA_ONLY,
        "arrow_config": LORA_ONLY,
        "runtime_config": LORA_ONLY,
        "use_bdlora": LORA_ONLY,
        "use_qalora": LORA_ONLY,
        "qalora_group_size": LORA_ONLY,
        "lora_bias": LORA_ONLY,
        "alora_invocation_tokens": LORA_ONLY,
        "layer_replication": LORA_ONLY,
        "target_parameters": LORA_ONLY,
        "trainable_token_indices": LORA_ONLY,
        "ensure_weight_tying": LORA_ONLY,
    }
    defaults: ClassVar[dict[str, Any]] = {"alpha": None, "dropout": 0.05, "tinit": None, "tfinal": None}
    values: ClassVar[dict[str, Values]] = {
        "alpha": ABOVE_ZERO,
        "tinit": NOT_NEGATIVE,
        "tfinal": NOT_NEGATIVE,
        "orth_reg_weight": ZERO_OR_MORE,
        "beta1": OPEN_INTERVAL,
        "beta2": OPEN_INTERVAL,
    }
    texts: ClassVar[dict[str, str]] = {
        "init_r": "Rank of every layer at the start.",
        "target_r": "Average rank of a layer at the end; below `init_r`.",
        "alpha": "Numerator of the update's scaling. Null is `2 * init_r`.",
        "dropout": "Dropout on the input of the update while training.",
        "tinit": "Steps before ranks begin to be taken away. Null is a tenth of the run.",
        "tfinal": "Steps at the end in which ranks stay as they are. Null is a third of the run.",
        "delta_t": "Steps from one reduction of ranks to the next.",
        "beta1": "Smoothing of the importance of weights over steps.",
        "beta2": "Smoothing of how much that importance varies.",
        "orth_reg_weight": "Weight of the term of the loss that keeps A and B orthogonal.",
    }

    # What Ludwig's own type has, with the values that ask for nothing: a config written for it stays valid.
    r: int | None = option(
        POSITIVE.or_null().schema, POSITIVE.expects, "Another name of `init_r`. PEFT's AdaLoRA has no other rank."
    )
    total_step: int | None = option(
        POSITIVE.or_null().schema,
        POSITIVE.expects,
        "Ludwig's option for the length of the run, which is known here; other values than 10000, Ludwig's default, "
        "must be equal to it.",
    )
    use_rslora: bool = option(one_of(False).schema, "false: AdaLoRA has no rsLoRA", "Of LoRA; false.", False)
    use_dora: bool = option(one_of(False).schema, "false: AdaLoRA has no DoRA", "Of LoRA; false.", False)
    init_lora_weights: str | bool = option(
        one_of("default", True).schema, "default: AdaLoRA has one initialisation", "Of LoRA; default.", "default"
    )
    loraplus_lr_ratio: None = option({"type": "null"}, "null: LoRA+ is for lora", "Of LoRA; null.")
    eva_config: None = option({"type": "null"}, "null: EVA is for lora", "Of LoRA; null.")
    loftq_config: None = option({"type": "null"}, "null: LoftQ is for lora", "Of LoRA; null.")
    rank_pattern: None = option({"type": "null"}, "null: AdaLoRA finds the ranks itself", "Of LoRA; null.")
    alpha_pattern: None = option({"type": "null"}, "null: it is an option of lora", "Of LoRA; null.")
    layer_replication: None = option({"type": "null"}, "null: it is an option of lora", "Of LoRA; null.")

    def problems(self) -> list[str]:
        """Return what is wrong with ranks and schedule, whatever the base."""
        options: Any = self
        problems, start = super().problems(), self.initial_rank
        ludwig_default = options.r == 8 and "init_r" in self.model_fields_set  # a config that Ludwig has written out
        if options.r is not None and options.r != start and not ludwig_default:
            problems.append(f"r: {options.r} and init_r: {start} are two names of one option; keep one of them.")
        if options.target_r >= start:
            problems.append(f"target_r: {options.target_r} is not below init_r: {start}; no rank would be taken away.")
        return problems

    @property
    def initial_rank(self) -> int:
        """The rank of every layer at the start."""
        options: Any = self
        given = options.r is not None and "init_r" not in self.model_fields_set
        return int(options.r if given else options.init_r)

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.AdaLoraConfig`; its schedule is set when the run's length is known."""
        arguments = super().peft_arguments()
        arguments.pop("tinit", None)
        arguments.pop("tfinal", None)
        arguments.setdefault("lora_alpha", 2 * self.initial_rank)
        return arguments | {"init_r": self.initial_rank, "total_step": UNTIL_TRAINED}

    @classmethod
    def settle(cls, model: "PeftModel") -> None:
        """Keep the ranks by which updates are divided from being trained, as PEFT does on a 16-bit base."""
        from peft.tuners.adalora import AdaLoraLayer

        for layer in model.modules():
            if isinstance(layer, AdaLoraLayer):
                layer.ranknum.requires_grad_(False)

    def step_hooks(self, model: "PeftModel", total_steps: int) -> "StepHooks":
        """Return what takes ranks away while training."""
        from ludwig_peft_plugin.adapters.adalora_steps import AdaLoraSteps

        options: Any = self
        return AdaLoraSteps(
            model, total_steps, tinit=options.tinit, tfinal=options.tfinal, stated_total=options.total_step
        )
