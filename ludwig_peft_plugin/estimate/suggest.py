"""Which settings of a config would lower its memory, and by how much each, worked out by estimating with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ludwig_peft_plugin.config.adapter_types import AdapterSelection, quantization_problem
from ludwig_peft_plugin.config.quantization import QuantizationConfig
from ludwig_peft_plugin.errors import PluginError
from ludwig_peft_plugin.estimate.batch import EVALUATION, ROWS, BatchPlan
from ludwig_peft_plugin.estimate.memory import CUDA_CONTEXT, Estimator
from ludwig_peft_plugin.model.base_model import trains_base

WORTH_NAMING = 32 * 2**20
"""Changes that save fewer bytes are left out."""

SHORT_ROW = 128
"""Rows are not suggested to be shorter than this many tokens."""

DOUBLE_QUANTISED = {"bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LEAN_OPTIMISER = "paged_adamw_8bit"


@dataclass(frozen=True)
class Case:
    """What is estimated: a config, and the rows or tokens of a micro-batch."""

    config_obj: Any
    plan: BatchPlan
    size: int


@dataclass(frozen=True)
class Change:
    """A change of settings that needs less memory.

    Attributes:
        kind: what is changed; of several changes of a kind one is suggested.
        text: the settings, as they stand in YAML, several separated by commas.
        cost: what it costs, in a few words.
        apply: makes the changed case out of another.
    """

    kind: str
    text: str
    cost: str
    apply: Callable[[Case], Case]


@dataclass(frozen=True)
class Suggestion:
    """A change, the bytes it saves, and the bytes that are needed with it."""

    change: Change
    saves: int
    needed: int


class Memories:
    """Estimates cases; models are built once for each config."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimators = [estimator]

    def estimator(self, config_obj: Any) -> Estimator:
        """Return the estimator of a config."""
        known = next((entry for entry in self._estimators if entry.config_obj is config_obj), None)
        if known is None:
            # The configured one and the last are kept; a model of many layers takes memory even without data.
            known = Estimator(config_obj)
            self._estimators = [self._estimators[0], known]
        return known

    def needed(self, case: Case) -> int:
        """Return the bytes of GPU memory that a case needs."""
        return self.estimator(case.config_obj).estimate(case.plan.shape(case.size)).needed

    def needed_to_evaluate(self, case: Case) -> int:
        """Return the bytes of GPU memory that a case needs while it evaluates the loss."""
        return self.estimator(case.config_obj).evaluation(case.plan.shape(case.size)).needed

    def resident(self, case: Case) -> int:
        """Return the bytes of GPU memory that a case needs before it has trained a step."""
        estimator = self.estimator(case.config_obj)
        return estimator.base_bytes + estimator.adapter_bytes + CUDA_CONTEXT


def suggestions(case: Case, needed: Callable[[Case], int], available: int | None = None) -> list[Suggestion]:
    """Return the changes that save memory, the one that saves most first.

    Of several changes of a kind (batch sizes) it is the one that changes least and fits, or the one that saves most.

    Args:
        case: what is too large.
        needed: returns the bytes that a case needs.
        available: bytes there are, where that is known.
    """
    before = needed(case)
    best: dict[str, Suggestion] = {}
    for change in changes(case):
        present = best.get(change.kind)
        if present is not None and available is not None and present.needed <= available:
            continue
        try:
            after = needed(change.apply(case))
        except PluginError:
            continue  # this change does not go with the rest of the config
        if before - after >= WORTH_NAMING and (present is None or after < present.needed):
            best[change.kind] = Suggestion(change, before - after, after)
    return sorted(best.values(), key=lambda suggestion: -suggestion.saves)


def combination(
    case: Case, single: list[Suggestion], needed: Callable[[Case], int], available: int
) -> tuple[list[Suggestion], int]:
    """Return the first of `single` that together fit into `available` bytes, or all, with the bytes they need."""
    chosen: list[Suggestion] = []
    total = needed(case)
    for suggestion in single:
        if total <= available:
            break
        changed = suggestion.change.apply(case)
        after = needed(changed)
        if after < total:
            case, total = changed, after
            chosen.append(suggestion)
    return chosen, total


def changes(case: Case) -> Iterator[Change]:
    """Yield the changes that the config does not have yet."""
    yield from _precision(case.config_obj)
    yield from _quantization(case.config_obj)
    yield from _checkpointing(case.config_obj.trainer)
    yield from _embedding(case.config_obj.trainer)
    yield from _batch(case)
    yield from _optimiser(case.config_obj.trainer)
    yield from _rank(case.config_obj)


def _configured(kind: str, text: str, cost: str, change: Callable[[Any], None]) -> Change:
    """Return a change of the config alone."""

    def apply(case: Case) -> Case:
        config_obj = copy.deepcopy(case.config_obj)
        change(config_obj)
        return Case(config_obj, case.plan, case.size)

    return Change(kind, text, cost, apply)


def _precision(config_obj: Any) -> Iterator[Change]:
    if trains_base(config_obj):

        def adapt(config: Any) -> None:
            config.adapter = AdapterSelection().resolve({"type": "lora"})

        yield _configured("adapter", "adapter: {type: lora}", "trains an adapter instead of the whole model", adapt)
    full = getattr(config_obj.adapter, "trains_base", False)
    if full and config_obj.adapter.compute == "float32":

        def mix(config: Any) -> None:
            config.adapter.compute, config.precision = "bfloat16", "auto"

        yield _configured("precision", "adapter.compute: bfloat16", "products have fewer digits", mix)
    if config_obj.precision == "float32" and not full:

        def halve(config: Any) -> None:
            config.precision = "bfloat16"

        yield _configured("precision", "precision: bfloat16", "weights and activations have fewer digits", halve)


def _quantization(config_obj: Any) -> Iterator[Change]:
    named = _named_adapters(config_obj)
    if not named or any(quantization_problem(type(adapter), adapter.type) for adapter in named.values()):
        return
    present = config_obj.quantization
    if present is not None and present.bits == 4 and present.bnb_4bit_use_double_quant:
        return

    def quantise(config: Any) -> None:
        config.quantization = QuantizationConfig.model_validate(DOUBLE_QUANTISED)

    if present is not None and present.bits == 4:
        text, cost = "quantization.bnb_4bit_use_double_quant: true", "almost nothing"
    else:
        text, cost = "quantization: {bits: 4}", "frozen weights in 4-bit NormalFloat, slower steps"
    yield _configured("quantization", text, cost, quantise)


def _checkpointing(trainer: Any) -> Iterator[Change]:
    if not trainer.enable_gradient_checkpointing:

        def enable(config: Any) -> None:
            config.trainer.enable_gradient_checkpointing = True

        text = "trainer.enable_gradient_checkpointing: true"
        yield _configured("checkpointing", text, "about a third more time a step", enable)
        return
    if trainer.checkpoint_layers < 1:

        def all_layers(config: Any) -> None:
            config.trainer.checkpoint_layers = 1.0

        yield _configured("layers", "trainer.checkpoint_layers: 1.0", "more time a step", all_layers)
    if not trainer.checkpoint_offload:

        def offload(config: Any) -> None:
            config.trainer.checkpoint_offload = True

        yield _configured("offloading", "trainer.checkpoint_offload: true", "copies to the host and back", offload)


def _embedding(trainer: Any) -> Iterator[Change]:
    if not trainer.embedding_offload:

        def offload(config: Any) -> None:
            config.trainer.embedding_offload = True

        text = "trainer.embedding_offload: true"
        yield _configured("embedding", text, "a few megabytes a step from the host", offload)


def _batch(case: Case) -> Iterator[Change]:
    plan, smallest = case.plan, 1 if case.plan.unit == ROWS else case.plan.row_tokens
    cost = "smaller products run less efficiently"
    for size in dict.fromkeys((case.size // 2, case.size // 4, smallest)):
        if smallest <= size < case.size:
            text = f"{plan.option}: {size}"
            steps = plan.accumulation
            if plan.option != EVALUATION:
                steps *= -(-case.size // size)
                text += f", trainer.gradient_accumulation_steps: {steps}"
            yield Change("batch", text, cost, _resized(size, steps))
    if plan.row_tokens >= 2 * SHORT_ROW:
        limit = plan.row_tokens // 2
        text = f"preprocessing.global_max_sequence_length: {limit}"
        yield Change("rows", text, "longer rows are cut", _shortened(limit))


def _resized(size: int, accumulation: int) -> Callable[[Case], Case]:
    def apply(case: Case) -> Case:
        return Case(case.config_obj, replace(case.plan, accumulation=accumulation), min(case.size, size))

    return apply


def _shortened(limit: int) -> Callable[[Case], Case]:
    def apply(case: Case) -> Case:
        return Case(case.config_obj, replace(case.plan, row_tokens=limit), case.size)

    return apply


def _optimiser(trainer: Any) -> Iterator[Change]:
    if trainer.optimizer.type.startswith("adam") and not trainer.optimizer.is_8bit:
        from ludwig.schema.optimizers import get_optimizer_cls

        def lean(config: Any) -> None:
            config.trainer.optimizer = get_optimizer_cls(LEAN_OPTIMISER)()

        text = f"trainer.optimizer.type: {LEAN_OPTIMISER}"
        yield _configured("optimizer", text, "state in 8 bits, moved to the host when needed", lean)


def _rank(config_obj: Any) -> Iterator[Change]:
    for path, adapter in _named_adapters(config_obj).items():
        rank = getattr(adapter, "r", None)
        if isinstance(rank, int) and rank > 1 and rank % 2 == 0:
            kind = "rank" if path == "adapter" else f"rank of {path}"
            text, cost = f"{path}.r: {rank // 2}", "the adapter can express less"
            yield _configured(kind, text, cost, _with_rank(path, rank // 2))


def _with_rank(path: str, rank: int) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        if path != "adapter":
            config.adapters.adapters = config.adapters.objects()
        _named_adapters(config)[path].r = rank

    return change


def _named_adapters(config_obj: Any) -> dict[str, Any]:
    """Return the adapters of a config by their paths in it."""
    if config_obj.adapter:
        return {"adapter": config_obj.adapter}
    section = getattr(config_obj, "adapters", None)
    return {f"adapters.adapters.{name}": adapter for name, adapter in (section.objects() if section else {}).items()}
