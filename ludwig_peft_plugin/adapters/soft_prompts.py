"""Adapter types that learn virtual tokens: options derived from PEFT's configs, and how the tokens start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig

from ludwig_peft_plugin.adapters.base import Batches, register
from ludwig_peft_plugin.adapters.derived import DerivedConfig
from ludwig_peft_plugin.adapters.peft_options import derive, own_fields, with_options
from ludwig_peft_plugin.adapters.peft_schema import POSITIVE

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

FOLLOWS_FROM_BASE = "follows from the base model"
OURS = "the plugin's own option `init` says how virtual tokens start"

REMOVED = {
    "token_dim": FOLLOWS_FROM_BASE,
    "num_transformer_submodules": FOLLOWS_FROM_BASE,
    "num_attention_heads": FOLLOWS_FROM_BASE,
    "num_layers": FOLLOWS_FROM_BASE,
    "init_weights": OURS,
    "prompt_tuning_init": OURS,
    "prompt_tuning_init_text": "the plugin's own option is `init_text`",
    "tokenizer_name_or_path": "the text of `init_text` is read with the base model's tokenizer",
    "tokenizer_kwargs": "the text of `init_text` is read with the base model's tokenizer",
    "modules_to_save": "of the base nothing is trained; `lora` has the option",
}
"""Fields of PEFT's prompt-learning configs that are no option of any type, and why."""

VALUES = {"num_virtual_tokens": POSITIVE, "encoder_hidden_size": POSITIVE, "num_tasks": POSITIVE, "num_ranks": POSITIVE}
"""Values of fields that PEFT gives no default to go by."""

TEXTS = {
    "num_virtual_tokens": "How many virtual tokens stand before every row. They take up as much of the context.",
    "encoder_hidden_size": "Width of the network that makes the virtual tokens while training. Null is the width of "
    "what it makes for one layer.",
}


class SoftPrompt(DerivedConfig):
    """Virtual tokens before every row; the base itself is not changed. A subclass is one way to make them.

    The weights are float32, also over a 16-bit or quantised base. Rows with virtual tokens are packed without padding
    like all others (`engine/virtual_tokens.py`), generation is batched, and gradient checkpointing changes no number.
    """

    family: ClassVar[str] = "soft prompt"
    starts_as_base: ClassVar[bool] = False
    several: ClassVar[bool] = True
    quantized_base: ClassVar[bool] = True
    soft_prompt: ClassVar[bool] = True

    removed_from_all: ClassVar[Mapping[str, str]] = REMOVED

    @property
    def start(self) -> str:
        """How virtual tokens start: the option `init`, `random` for types without it."""
        return str(getattr(self, "init", "random"))

    @property
    def needs_data(self) -> bool:
        """Whether the start is read off training rows."""
        return self.start == "data"

    @property
    def context_tokens(self) -> int:
        """How many tokens of the model's context the adapter takes up."""
        return int(getattr(self, "num_virtual_tokens", 0))

    def start_plainly(self) -> None:
        """Start at random from now on, with weights of the same sizes; for where there are neither data nor weights."""
        if hasattr(self, "init"):
            self.init = "random"

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        text = getattr(self, "init_text", None)
        if self.start == "text" and not text:
            return ["init_text is missing: with init: text it is the text whose tokens the virtual ones start as."]
        if self.start != "text" and text is not None:
            return ["init_text has no effect without init: text; add that, or remove it."]
        return []

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> PeftConfig:
        """Return the PEFT config of these options; `kwargs` replace PEFT arguments and unknown ones are ignored."""
        known = own_fields(self.peft_config())
        arguments = self.peft_arguments() | {name: value for name, value in kwargs.items() if name in known}
        return self.peft_config()(**{**arguments, "task_type": task_type})

    def build(self, base: PreTrainedModel, batches: Batches | None) -> PeftModel:
        """Put a new adapter on `base` and let its virtual tokens start as asked; see `AdapterConfig.build`."""
        from ludwig_peft_plugin.adapters.peft_build import wrap_with_peft
        from ludwig_peft_plugin.adapters.soft_prompt_start import check_room, start_tokens

        check_room(base, self.context_tokens)
        # Drawn and read before PEFT takes random numbers for weights that are replaced.
        tokens = start_tokens(self, base, batches)
        model = wrap_with_peft(base, self.to_config(task_type="CAUSAL_LM"))
        self.begin(model, base, tokens)
        return model

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Set the prompt encoder's weights.

        Args:
            model: the base with the adapter as PEFT makes it.
            base: the model without the adapter.
            tokens: ids of the tokens to start as, shape (P,); None for weights as PEFT draws them.
        """

    def merge_obstacle(self, base: PreTrainedModel) -> str | None:
        """Return why this adapter cannot be merged: virtual tokens are inputs."""
        return f"adapter.type: {self.type} adds virtual tokens, which are inputs and no change of the base's weights."


def soft_prompt[T: type[SoftPrompt]](name: str, *, replace: bool = False) -> Callable[[T], T]:
    """Return a class decorator that derives a type's options from PEFT and registers it as `type: <name>`.

    Args:
        name: the type's name in a config.
        replace: take the place of another type of that name.
    """

    def decorate(cls: T) -> T:
        options = derive(
            cls.peft_config(),
            renamed=cls.renamed,
            removed=REMOVED | cls.removed,
            defaults=cls.defaults,
            texts=TEXTS | cls.texts,
            values=VALUES | cls.values,
        )
        return register(name, replace=replace)(with_options(cls, name, cls.summary, list(options)))

    return decorate
