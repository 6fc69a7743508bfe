"""`adapter: {type: beft}`: a trained bias on the value projections."""

from typing import TYPE_CHECKING, ClassVar

from ludwig_peft_plugin.adapters.lora_options import target_modules_option
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@peft_method("beft")
class BeftConfig(PeftMethod):
    r"""BEFT, bias-efficient fine-tuning, 2025 (https://arxiv.org/abs/2509.15974).

    A layer computes `W x + b + d` with a trained vector d of shape [out], which starts at zero. The paper finds that
    the bias of the value projection serves better than those of query and key, so `target_modules` is PEFT's list for
    the architecture (`v_proj` of Llama). Unlike `bitfit` it needs no bias in the base.
    """

    family: ClassVar[str] = "additive"
    paper: ClassVar[str] = "BEFT 2025, https://arxiv.org/abs/2509.15974"
    good_for: ClassVar[str] = "the fewest parameters, on little data"
    learning_rate: ClassVar[float | None] = 2e-2
    peft_type: ClassVar[str] = "BEFT"
    title: ClassVar[str] = "BEFT"
    summary: ClassVar[str] = "Trains a bias that is added to the value projections."

    target_modules: list[str] | str | None = target_modules_option(default=None)

    def merge_obstacle(self, base: "PreTrainedModel") -> str | None:
        """Return the first adapted module without a bias to merge into."""
        from ludwig_peft_plugin.adapters.targets import find_targets

        for name in find_targets(base, self).names:
            if getattr(base.get_submodule(name), "bias", None) is None:
                return f"adapter.type: beft cannot be merged: {name} has no bias into which the adapter's could go."
        return None
