"""`adapter: {type: ia3}`: vectors that scale keys, values and the inside of feed-forward layers."""

from typing import TYPE_CHECKING, Any, ClassVar

from transformers.pytorch_utils import Conv1D

from ludwig_peft_plugin.adapters.lora_options import target_modules_option
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import BOOLEAN, COMMON, Values
from ludwig_peft_plugin.adapters.shapes import Shapes
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("ia3", replace=True)
class IA3Config(PeftMethod):
    r"""(IA)^3, Liu et al. 2022 (https://arxiv.org/abs/2205.05638).

    Keys and values are multiplied by element with a trained vector: `l * (W x)`, l of shape [out]. In feed-forward
    layers it is the activation between the two matrices: `W (l * x)`, l of shape [in] of the second one. Vectors start
    at one, so the adapted model starts as the base.

    The modules are PEFT's for the architecture (of Llama `k_proj`, `v_proj` and, as feed-forward, `down_proj`). The
    paper trains with a learning rate of 3e-3.
    """

    family: ClassVar[str] = "scaling"
    paper: ClassVar[str] = "Liu et al. 2022, https://arxiv.org/abs/2205.05638"
    good_for: ClassVar[str] = "few-shot tuning with very few parameters"
    learning_rate: ClassVar[float | None] = 1e-2
    peft_type: ClassVar[str] = "IA3"
    title: ClassVar[str] = "IA3"
    summary: ClassVar[str] = "Trains vectors that scale keys, values and the inside of feed-forward layers."
    renamed: ClassVar[dict[str, str]] = {"fan_in_fan_out": "fan_in_fan_out"}
    values: ClassVar[dict[str, Values]] = {
        "feedforward_modules": COMMON["target_modules"],
        "fan_in_fan_out": BOOLEAN,
    }
    texts: ClassVar[dict[str, str]] = {
        "feedforward_modules": "Which of `target_modules` have their inputs scaled instead of their outputs. Null "
        "takes those that lead back from the inside of a feed-forward layer (of Llama `down_proj`).",
        "fan_in_fan_out": "Of Ludwig's own type. It follows from the layers; true where none is a Conv1D is an error.",
        "init_ia3_weights": "Whether vectors start at one. With false they start at random and change the model before "
        "it is trained.",
    }

    target_modules: list[str] | str | None = target_modules_option(default=None)

    def architecture_targets(self, model_type: str) -> list[str] | str | None:
        """Return PEFT's modules for an architecture."""
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

        targets: list[str] | str | None = DEFAULTS.get(model_type)
        return targets

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.IA3Config`; listed feed-forward modules are resolved in `fitted`."""
        arguments = super().peft_arguments()
        if isinstance(arguments.get("feedforward_modules"), list):
            del arguments["feedforward_modules"]
        return arguments

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the feed-forward modules among the adapted ones, by full names, and check those given."""
        options: Any = self
        transposed = any(isinstance(base.get_submodule(name), Conv1D) for name in shapes)
        if options.fan_in_fan_out and not transposed:
            raise AdapterError(
                "adapter.fan_in_fan_out: true is for Conv1D layers, as GPT-2's, and the base's are Linear; leave it "
                "out, it follows from the layers."
            )
        if isinstance(options.feedforward_modules, str):
            return {}
        given = options.feedforward_modules
        if given is None:
            hidden = base.config.get_text_config().hidden_size
            back = [name for name, (inputs, outputs) in shapes.items() if outputs == hidden < inputs]
            return {"target_modules": list(shapes), "feedforward_modules": back}
        chosen = [name for name in shapes if any(name == entry or name.endswith(f".{entry}") for entry in given)]
        idle = [entry for entry in given if not any(name == entry or name.endswith(f".{entry}") for name in shapes)]
        if idle:
            raise AdapterError(
                f"adapter.feedforward_modules: {', '.join(idle)} is not among the adapted modules; add it to "
                "target_modules, or leave it out."
            )
        return {"target_modules": list(shapes), "feedforward_modules": chosen}
