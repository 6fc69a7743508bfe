"""What cannot work together with a `quantization` section, and its options that would change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ludwig_peft_plugin.config.adapter_types import adapter_class, capabilities, quantization_problem
from ludwig_peft_plugin.config.problems import Problem
from ludwig_peft_plugin.config.quantization import MODES, NOT_TRAINED, QuantizationConfig
from ludwig_peft_plugin.config.raw import feature, section, trainer_type
from ludwig_peft_plugin.config.sections import options

OF_BITSANDBYTES = (
    "bits",
    "llm_int8_threshold",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_type",
)
NO_ADAPTER = "the weights of a quantised base cannot be trained themselves; add `adapter: {}` or remove the section"


def quantization_problems(config: dict[str, Any], adapters: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the `quantization` section of a config.

    Args:
        config: the whole config; parts of the wrong kind are left to other checks.
        adapters: its adapter sections by the path they stand at.
    """
    quantization = config.get("quantization")
    given = section(config, "quantization")
    trains = trainer_type(config) != "none"
    for path, adapter in adapters.items():
        cls = adapter_class(adapter)
        if cls is None:
            continue
        name = str(adapter.get("type") if isinstance(adapter, dict) else adapter)
        if capabilities(cls).default_quantization and "quantization" in config and quantization is None:
            yield Problem(
                "quantization", f"null, but adapter type `{name}` is for a quantised base; use `lora` instead"
            )
        elif quantization and trains and (text := quantization_problem(cls, name, given.get("backend"))):
            yield Problem(f"{path}.type", text)
    if quantization and trains and not adapters:
        yield Problem("quantization", NO_ADAPTER.format("lora" if given.get("backend") == "torchao" else "qlora"))
    if given.get("backend") == "torchao":
        yield from _torchao(config, given)
    elif given.get("float8_transposed_copy") is False:
        yield _unread("float8_transposed_copy", "backend `torchao` with mode `float8`")


def _torchao(config: dict[str, Any], given: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with a section of `backend: torchao`."""
    output = feature(config, "output_features").get("type")
    if config.get("is_multimodal") or output not in (None, "text") or trainer_type(config) not in ("none", "finetune"):
        yield Problem("quantization.backend", "`torchao` is for models that answer in text; use `bitsandbytes`")
        return
    mode = given.get("mode")
    if mode is None:
        yield Problem("quantization.mode", f"is missing; give one of {', '.join(f'`{name}`' for name in MODES)}")
    elif mode in NOT_TRAINED:
        yield Problem("quantization.mode", f"`{mode}` {NOT_TRAINED[mode]}")
    if given.get("qat"):
        yield Problem(
            "quantization.qat",
            "trains the base's weights, and an adapter leaves them as they are; remove it, and train the adapter on "
            "the quantised base",
        )
    known = options(QuantizationConfig)
    for name in OF_BITSANDBYTES:
        if given.get(name) not in (None, known[name].default):
            yield _unread(name, "backend `bitsandbytes`")
    if mode == "int8_weight_only" and given.get("float8_transposed_copy") is False:
        yield _unread("float8_transposed_copy", "mode `float8`")


def _unread(name: str, reader: str) -> Problem:
    return Problem(f"quantization.{name}", f"is read by {reader} alone; remove it")
