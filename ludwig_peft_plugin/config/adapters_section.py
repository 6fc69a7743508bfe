"""The `adapters` section: several named adapters on one base, which of them answer and train, and their merge."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from ludwig.schema.llms.peft import BaseAdapterConfig, NamedAdaptersConfig

from ludwig_peft_plugin.adapters.fields import option, section
from ludwig_peft_plugin.config.adapter_types import AdapterSelection, adapter_class
from ludwig_peft_plugin.config.problems import Problem
from ludwig_peft_plugin.config.raw import section as raw_section
from ludwig_peft_plugin.config.raw import trainer_type

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED = ("base",)
"""Names that stand for something else when an adapter is chosen."""

COMBINATIONS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "uniqueItems": True}
_NULL = {"type": "null"}


class MergeConfig(schema_utils.LudwigBaseConfig):
    """One more adapter, made of others by weights."""

    name: str = schema_utils.String(default="merged", description="The name of the merged adapter.")
    sources: list[str] | None = option(
        {"anyOf": [_NAMES, _NULL]},
        "a list of adapter names",
        "The adapters it is made of, at least one.",
    )
    weights: list[float] | None = option(
        {"anyOf": [{"type": "array", "items": {"type": "number"}, "minItems": 1}, _NULL]},
        "a list of numbers, one for each source",
        "How much of each source goes in. Null is 1 for each, their sum.",
    )
    combination_type: str = schema_utils.StringOptions(
        options=list(COMBINATIONS),
        default="linear",
        description="How adapters are combined. For LoRA `cat` is exactly the weighted sum of the changes, at the sum "
        "of the ranks, `svd` its best approximation at the largest rank, `linear` adds up the factors, which is rough; "
        "the others drop small or random changes first. IA3 has `linear` alone.",
    )
    density: float = schema_utils.FloatRange(
        default=0.5,
        min=0.0,
        max=1.0,
        description="The share of the changes that is kept, for `ties`, `dare` and `magnitude_prune` combinations.",
    )


class AdaptersConfig(NamedAdaptersConfig):
    """Several named adapters on one base, instead of `adapter`."""

    active: str | list[str] | None = option(
        {"anyOf": [{"type": "string", "minLength": 1}, _NAMES, _NULL]},
        "the name of an adapter, or a list of them",
        "The adapter that is used, or several whose effects add up. Null is the first of `adapters`.",
    )
    trained: list[str] | None = option(
        {"anyOf": [_NAMES, _NULL]},
        "a list of adapter names",
        "Which of the active adapters training changes; the others stay as they are. Null is all of them.",
    )
    column: str | None = schema_utils.String(
        default=None,
        allow_none=True,
        description="A column of the data that names, in predictions and evaluations, the adapter of each row "
        "(`base` for none). An empty cell is the active adapter.",
    )
    merge: MergeConfig | None = section(MergeConfig)

    def objects(self) -> dict[str, BaseAdapterConfig]:
        """Return the config object of each adapter, by name.

        Raises:
            ConfigValidationError: one has a wrong option.
        """
        found: dict[str, BaseAdapterConfig] = {}
        for name, values in (self.adapters or {}).items():
            adapter = AdapterSelection(f"adapters.adapters.{name}").resolve(values)
            assert adapter is not None
            found[name] = adapter
        return found

    def active_names(self) -> list[str]:
        """Return the adapters that are used."""
        if self.active is None:
            return list(self.adapters or {})[:1]
        return [self.active] if isinstance(self.active, str) else list(self.active)

    def trained_names(self) -> list[str]:
        """Return the adapters that training changes."""
        return self.active_names() if self.trained is None else list(self.trained)

    @property
    def needs_data(self) -> bool:
        """Whether an adapter's initialisation reads training rows."""
        return any(getattr(adapter, "needs_data", False) for adapter in self.objects().values())


def several_problems(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with how the adapters of a config go together; wrong options of one are reported elsewhere.

    Args:
        config: the whole config; parts of the wrong kind are left to other checks.
    """
    given = raw_section(config, "adapters")
    named = raw_section(given, "adapters")
    if config.get("adapters") is None:
        return
    if not named:
        yield Problem("adapters.adapters", "is empty; name at least one adapter, as {mine: {type: lora}}")
        return
    yield from _name_problems(named)
    merge = raw_section(given, "merge")
    if given.get("merge") is not None:
        yield from _merge_problems(merge, named)
    merged = [str(merge.get("name") or "merged")] if merge else []
    active = given.get("active") or next(iter(named))
    active = [active] if isinstance(active, str) else list(active)
    trained = given.get("trained")
    for path, names, known in (
        ("adapters.active", active, [*named, *merged]),
        ("adapters.trained", trained or [], active),
    ):
        for name in names:
            if name not in known:
                what = "there is no adapter of this name" if path.endswith("active") else "this adapter is not active"
                yield Problem(path, f"{name!r}: {what}; give one of {', '.join(map(str, known))}")
    changed = active if trained is None else trained
    sources = set(merge.get("sources") or []) & set(changed)
    if merged and merged[0] in active and sources:
        yield Problem(
            "adapters.trained",
            f"{', '.join(sorted(sources))} is trained, and {merged[0]!r}, which is active with it, is made of it; "
            "train either the merged adapter or its sources",
        )
    if trainer_type(config) == "none":
        for name, values in named.items():
            if isinstance(values, str) or (isinstance(values, dict) and not values.get("pretrained_adapter_weights")):
                yield Problem(
                    f"adapters.adapters.{name}",
                    "needs pretrained_adapter_weights with trainer.type: none, because nothing is trained",
                )
    yield from _sharing_problems(named, merge, active)


def _name_problems(named: dict[str, Any]) -> Iterator[Problem]:
    for name in named:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            yield Problem(
                f"adapters.adapters.{name}",
                "a name begins with a letter and has letters, digits, `_` and `-`; `base` stands for no adapter",
            )


def _merge_problems(merge: dict[str, Any], named: dict[str, Any]) -> Iterator[Problem]:
    sources, weights, name = merge.get("sources"), merge.get("weights"), merge.get("name") or "merged"
    if not sources:
        yield Problem("adapters.merge.sources", f"is missing; name adapters to merge, of {', '.join(map(str, named))}")
        return
    for source in sources if isinstance(sources, list) else []:
        if source not in named:
            yield Problem(
                "adapters.merge.sources",
                f"{source!r}: there is no adapter of this name; give some of {', '.join(map(str, named))}",
            )
    if isinstance(weights, list) and len(weights) != len(sources):
        yield Problem("adapters.merge.weights", f"has {len(weights)} numbers for {len(sources)} sources; give as many")
    if name in named:
        yield Problem("adapters.merge.name", f"{name!r} is the name of another adapter; choose a new one")


def _sharing_problems(named: dict[str, Any], merge: dict[str, Any], active: list[Any]) -> Iterator[Problem]:
    """Yield which adapters cannot be on one base, be active together or be merged, by what their methods say."""
    kinds: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    for name, values in named.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of unknown options, reported elsewhere
                adapter = AdapterSelection(f"adapters.adapters.{name}").resolve(values)
            if adapter is None:
                continue
            obstacle = getattr(adapter, "sharing_obstacle", lambda: None)()
            if obstacle and (len(named) > 1 or getattr(adapter, "trains_base", False)):
                yield Problem(f"adapters.adapters.{name}", obstacle)
                continue
            kinds[name] = adapter.to_config(task_type="CAUSAL_LM", init_lora_weights=True).peft_type
            if not adapter.pretrained_adapter_weights:  # whose folder says what its rank is
                rank, pattern = getattr(adapter, "r", None), getattr(adapter, "rank_pattern", None) or {}
                ranks[name] = None if rank is None else max(rank, *pattern.values(), 0)
        except (ConfigValidationError, TypeError, ValueError, KeyError):
            continue  # reported where the section itself is checked, or by PEFT on the model
    first = next(iter(kinds), None)
    others = [name for name in kinds if kinds[name] != kinds[first]] if first is not None else []
    if first is not None and others:
        yield Problem(
            f"adapters.adapters.{others[0]}",
            f"is of the method {kinds[others[0]].value.lower()}, and {first!r} of {kinds[first].value.lower()}; "
            "adapters on one base are of one method (lora, qlora and dora are one)",
        )
        return
    together = [str(name) for name in active if name in kinds]
    if len(together) > 1 and getattr(adapter_class(named[together[0]]), "soft_prompt", False):
        yield Problem(
            "adapters.active",
            f"{', '.join(together)}: only one {kinds[together[0]].value.lower()} adapter can be active at a time; give "
            "one name",
        )
    if first is not None and merge:
        from ludwig_peft_plugin.adapters.several.merge import combinations

        known = combinations(kinds[first])
        how = str(merge.get("combination_type") or "linear")
        unequal = {name: ranks[name] for name in merge.get("sources") or [] if ranks.get(name) is not None}
        if not known:
            yield Problem(
                "adapters.merge",
                f"adapters of the method {kinds[first].value.lower()} cannot be merged by weights; remove it",
            )
        elif how in COMBINATIONS and how not in known:
            yield Problem(
                "adapters.merge.combination_type",
                f"{how!r} does not exist for the method {kinds[first].value.lower()}; give one of {', '.join(known)}",
            )
        elif len(set(unequal.values())) > 1 and how != "cat" and not how.endswith("svd"):
            stated = ", ".join(f"{name} has {rank}" for name, rank in unequal.items())
            ways = ", ".join(name for name in known if name == "cat" or name.endswith("svd"))
            yield Problem(
                "adapters.merge.combination_type", f"{how!r} needs equal ranks, and {stated}; give one of {ways}"
            )
