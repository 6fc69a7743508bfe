"""Every method of the installed PEFT: those with a file in `methods`, those of a newer PEFT, and those left out."""

from __future__ import annotations

import inspect
from typing import Any

from ludwig.schema.llms.peft import adapter_registry
from peft import PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method

EXCLUDED: dict[str, str] = {
    "CPT": "refines the embeddings of examples in the prompt, with a loss over their answers too and a bound on each "
    "kind of token, so every token's part has to be marked; `prompt_tuning` with `init: text` starts from such a text",
    "XLORA": "mixes LoRA adapters that were trained before; there are none in one training run",
    "POLY": "routes by the id of a row's task, and mixes skills of several tasks; there is one task here",
    "SHADOW": "trains a second, smaller model beside the base, with a loss of its own that reads that model's logits",
    "OSF": "trains nearly every number of each weight, to protect what earlier tasks taught; with one task that is "
    "`type: full` at a higher cost",
    "LILY": "averages its router's choice over all tokens of a batch, so that a token depends on those after it; the "
    "type `lily` decides for each token (LILY_TOKENS)",
    "TRAINABLE_TOKENS": "trains the embeddings of chosen tokens and nothing else; `lora` does so with "
    "trainable_token_indices",
}
"""Methods of PEFT that are no type, with the reason."""

ELSEWHERE: dict[str, str] = {
    "LORA": "lora",
    "ADAPTION_PROMPT": "adaption_prompt",
    "LN_TUNING": "ln_tuning",
    "PROMPT_TUNING": "prompt_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "P_TUNING": "p_tuning",
    "MULTITASK_PROMPT_TUNING": "multitask_prompt_tuning",
    "CARTRIDGE": "cartridge",
}
"""Methods whose type has options of its own making, and that type."""

PROMPT_LEARNING = (
    "learns virtual tokens, which the batches of text-to-text training have to make room for; there is no type for it"
)


def methods() -> dict[str, str | None]:
    """Return every method of the installed PEFT with why it is no type, None where it is one."""
    return {kind.value: _reason_against(kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def register_remaining() -> list[str]:
    """Register the methods of the installed PEFT that no file of ours describes, and return their names.

    Their options are all derived. What such a type can do is read off its tuner, and in doubt it cannot.
    """
    added = []
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(kind.value).lower()
        if kind.value in ELSEWHERE or _reason_against(kind) is not None or _described(kind.value) or _taken(name):
            continue
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
        data = {
            "__module__": __name__,
            "__doc__": f"{config.__name__} of PEFT, with the options PEFT gives it.",
            "__annotations__": {},
            "peft_type": kind.value,
            "title": config.__name__.removesuffix("Config"),
            "summary": f"The method {kind.value} of the installed PEFT.",
            "quantized_base": calls_base_layer(tuner),
            "mergeable": merges(tuner),
            "encoder": False,
            "several": False,
            "starts_as_base": False,
        }
        metaclass: Any = type(PeftMethod)
        cls = metaclass(config.__name__, (PeftMethod,), data)
        peft_method(name)(cls)
        added.append(name)
    return added


def calls_base_layer(tuner: type[BaseTuner]) -> bool:
    """Return whether every layer class of a tuner leaves the product with the base's weight to the base layer."""
    forwards = [inspect.getsource(cls.__dict__["forward"]) for cls in _layers(tuner) if "forward" in cls.__dict__]
    return bool(forwards) and all("self.base_layer(" in source for source in forwards)


def merges(tuner: type[BaseTuner]) -> bool:
    """Return whether every layer class of a tuner can be merged."""
    layers = [cls for cls in _layers(tuner) if "forward" in cls.__dict__]
    return bool(layers) and all(cls.merge is not BaseTunerLayer.merge for cls in layers)


def _layers(tuner: type[BaseTuner]) -> list[Any]:
    """Return the layer classes of a tuner, as its layers' module defines them."""
    layer: Any = getattr(tuner, "tuner_layer_cls", None)
    if layer is None:
        return []
    module = inspect.getmodule(layer)
    return [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, layer)]


def _reason_against(kind: PeftType) -> str | None:
    if kind.value in ELSEWHERE:
        return None
    if kind.value in EXCLUDED:
        return EXCLUDED[kind.value]
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig):
        return PROMPT_LEARNING
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if tuner is None or not issubclass(tuner, BaseTuner):
        return "does not put layers into the model as PEFT's other methods do, so it needs a type written for it"
    return None


def _described(peft_type: str) -> bool:
    return any(getattr(cls, "peft_type", None) == peft_type for cls in adapter_registry.values())


def _taken(name: str) -> bool:
    return any(name in (key, *getattr(cls, "aliases", ())) for key, cls in adapter_registry.items())
