"""What a comparison trains: the config of each method, made of one config and the overrides."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ludwig_peft_plugin.errors import ModelError

ALL = "all"
BASE = "base"
"""The base as it is, which is evaluated and not trained."""

SECTIONS = ("adapter", "trainer", "quantization", "preprocessing", "prompt", "generation", "evaluation", "precision")
"""What an override may hold beside options of the adapter."""


@dataclass(frozen=True)
class Job:
    """One method to train.

    Attributes:
        method: the adapter type, or `base`.
        config: the whole Ludwig config.
        seed: of the run.
    """

    method: str
    config: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """What tells this job from one with other settings."""
        return hashlib.sha256(json.dumps([self.config, self.seed], sort_keys=True, default=str).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return what the worker is told."""
        return {"method": self.method, "key": self.key, "seed": self.seed, "config": self.config}


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config without its `compare` section, and that section."""
    rest = {name: value for name, value in config.items() if name != "compare"}
    section = config.get("compare") or {}
    if not isinstance(section, dict):
        raise ModelError("compare: must be a mapping from methods to their options, as {bottleneck: {r: 8}}.")
    return rest, section


def chosen_methods(names: Sequence[str]) -> list[str]:
    """Return the adapter types that are meant, `base` first.

    Raises:
        ModelError: a name is no adapter type.
    """
    from ludwig.schema.llms.peft import adapter_registry

    from ludwig_peft_plugin.config.adapter_types import canonical_types
    from ludwig_peft_plugin.config.suggest import hint

    others, found = canonical_types(), []
    for name in (part.strip().lower() for part in names):
        canonical = others.get(name, name)
        if canonical == ALL:
            found += list(adapter_registry)
        elif canonical in adapter_registry or canonical == BASE:
            found.append(canonical)
        else:
            known = [*adapter_registry, *others, BASE, ALL]
            raise ModelError(f"--methods: {name!r} is no adapter type; {hint(name, known)}")
    return list(dict.fromkeys([BASE, *found]))


def jobs(
    config: Mapping[str, Any], methods: Sequence[str], overrides: Mapping[str, Any] | None = None, *, seed: int = 42
) -> list[Job]:
    """Return what has to be trained.

    A method trains with its type's own learning rate, and with the options its class has as defaults; the config's
    adapter section and learning rate are for the type the config names. Overrides win over both.

    Args:
        config: a Ludwig config of a language model, without `compare`.
        methods: adapter types, from `chosen_methods`.
        overrides: by method: options of its adapter, or whole sections.
        seed: of every run.

    Raises:
        ModelError: an override is for a method that is not compared, or no mapping.
    """
    overrides = {_canonical(name): values for name, values in (overrides or {}).items()}
    for name, values in overrides.items():
        if name not in methods:
            raise ModelError(f"compare.{name}: this method is not compared; add it to --methods, or remove it.")
        if not isinstance(values, dict):
            raise ModelError(f"compare.{name}: must be a mapping of options, as {{r: 8}}.")
    return [Job(method, _config_of(config, method, overrides.get(method, {})), seed) for method in methods]


def _config_of(config: Mapping[str, Any], method: str, override: Mapping[str, Any]) -> dict[str, Any]:
    from ludwig.schema.llms.peft import adapter_registry

    made = copy.deepcopy(dict(config))
    own = made.pop("adapter", None)
    for unwanted in ("adapters", "export", "hyperopt"):
        made.pop(unwanted, None)
    trainer = dict(made.get("trainer") or {})
    if method == BASE:
        return {**made, "trainer": {"type": "none", **_kept(trainer)}}
    own = {"type": own} if isinstance(own, str) else own
    mine = own is not None and _canonical(str(own.get("type"))) == method
    made["adapter"] = dict(own) if mine and own is not None else {"type": method}
    rate = getattr(adapter_registry[method], "learning_rate", None)
    if rate is not None and not mine:
        trainer["learning_rate"] = rate
    made["trainer"] = {"type": "finetune", **trainer}
    return _merged(made, override)


def _kept(trainer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: trainer[name] for name in ("batch_size",) if isinstance(trainer.get(name), int)}


def _merged(config: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with an override: sections by their names, everything else as options of the adapter."""
    for name, value in override.items():
        if name not in SECTIONS:
            config["adapter"] = {**config["adapter"], name: value}
        elif isinstance(value, dict) and isinstance(config.get(name), dict):
            config[name] = {**config[name], **value}
        else:
            config[name] = copy.deepcopy(value)
    return config


def _canonical(name: str) -> str:
    from ludwig_peft_plugin.config.adapter_types import canonical_types

    return canonical_types().get(name.lower(), name.lower())
