"""Options that cannot take effect together, or at all, with the chosen trainer and adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ludwig_peft_plugin.config.adapter_types import adapter_class, merge_problem
from ludwig_peft_plugin.config.adapters_section import several_problems
from ludwig_peft_plugin.config.hyperopt import hyperopt_problems
from ludwig_peft_plugin.config.no_effect import no_effect_problems
from ludwig_peft_plugin.config.problems import Problem
from ludwig_peft_plugin.config.quantization_rules import quantization_problems
from ludwig_peft_plugin.config.raw import section, trainer_type
from ludwig_peft_plugin.config.trainer import trainer_problems


def rule_problems(config: dict[str, Any]) -> list[Problem]:
    """Return the combinations in an LLM config that cannot work; parts of the wrong kind are left to other checks."""
    return [problem for rule in RULES for problem in rule(config)] + no_effect_problems(config)


def adapters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the adapter sections of a config by the path they stand at."""
    found = {"adapter": config["adapter"]} if config.get("adapter") else {}
    named = section(config, "adapters").get("adapters")
    for name, adapter in (named if isinstance(named, dict) else {}).items():
        found[f"adapters.adapters.{name}"] = adapter
    return found


def adapter_name(adapter: object) -> str:
    """Return the type of an adapter section as the config spells it."""
    return str(adapter.get("type") if isinstance(adapter, dict) else adapter)


def _trainer(config: dict[str, Any]) -> Iterator[Problem]:
    trainer = section(config, "trainer")
    named = next((adapter_name(adapter) for path, adapter in adapters(config).items() if path == "adapter"), None)
    weights = config["adapter"].get("pretrained_adapter_weights") if isinstance(config.get("adapter"), dict) else None
    if trainer.get("type") is None and (trainer or named):
        what = f"adapter `{named}`" if named else "the adapters" if config.get("adapters") else "the base"
        yield Problem("trainer.type", f"is missing; give `finetune` to train {what}, `none` to only predict")
    elif trainer_type(config) == "none" and named and not weights:
        yield Problem(
            "trainer.type",
            f"`none` trains nothing, so adapter `{named}` would stay without effect; give `finetune`, or name trained "
            "weights in adapter.pretrained_adapter_weights",
        )
    if trainer.get("steps_per_checkpoint") and trainer.get("checkpoints_per_epoch"):
        yield Problem("trainer.checkpoints_per_epoch", "cannot be given beside trainer.steps_per_checkpoint; keep one")


def _quantization(config: dict[str, Any]) -> Iterator[Problem]:
    yield from quantization_problems(config, adapters(config))


def _merge(config: dict[str, Any]) -> Iterator[Problem]:
    adapter = config.get("adapter")
    cls = adapter_class(adapter)
    if cls is None or not isinstance(adapter, dict):
        return
    wanted = section(adapter, "postprocessor").get("merge_adapter_into_base_model") is True
    if wanted and (text := merge_problem(cls, adapter_name(adapter))):
        yield Problem("adapter.postprocessor.merge_adapter_into_base_model", text)


def _full(config: dict[str, Any]) -> Iterator[Problem]:
    adapter = config.get("adapter")
    if not getattr(adapter_class(adapter), "trains_base", False):
        return
    compute = adapter.get("compute", "auto") if isinstance(adapter, dict) else "auto"
    name, precision = adapter_name(adapter), config.get("precision", "auto")
    if precision in ("bfloat16", "float16"):
        yield Problem(
            "precision",
            f"`{precision}` weights are too coarse to take small updates, so adapter `{name}` keeps them in float32; "
            "remove it (adapter.compute: bfloat16 has the products made in bfloat16)",
        )
    elif precision == "float32" and compute == "bfloat16":
        yield Problem("precision", "`float32` contradicts adapter.compute: bfloat16; keep one")
    if section(config, "trainer").get("use_mixed_precision") is True:
        yield Problem("trainer.use_mixed_precision", f"is not read beside adapter `{name}`; give adapter.compute")


def _export(config: dict[str, Any]) -> Iterator[Problem]:
    exports = config.get("export")
    if not isinstance(exports, list) or not exports:
        return
    if trainer_type(config) == "none":
        yield Problem("export", "exports are written after training; set trainer.type: finetune")
        return
    cls = adapter_class(config.get("adapter"))
    for index, entry in enumerate(exports):
        form = entry.get("format") if isinstance(entry, dict) else entry
        if form == "adapter" and (not adapters(config) or getattr(cls, "trains_base", False)):
            yield Problem(f"export[{index}]", "there is no adapter to write; add an adapter section or export `merged`")
        if form == "merged" and cls and (text := merge_problem(cls, adapter_name(config["adapter"]))):
            yield Problem(f"export[{index}]", text)


def _base_model(config: dict[str, Any]) -> Iterator[Problem]:
    if config.get("base_model") is None:
        yield Problem("base_model", "is missing; give a folder or a model's name")


def _data(config: dict[str, Any]) -> Iterator[Problem]:
    if config.get("dataset") and config.get("training_set"):
        yield Problem("training_set", "cannot be given beside dataset; keep one")
    for name in ("validation_set", "test_set"):
        if config.get(name) and not config.get("training_set"):
            yield Problem(name, "needs training_set; a single dataset is divided by preprocessing.split")


RULES = (
    _base_model,
    _trainer,
    trainer_problems,
    several_problems,
    _quantization,
    _full,
    _merge,
    _export,
    _data,
    hyperopt_problems,
)
