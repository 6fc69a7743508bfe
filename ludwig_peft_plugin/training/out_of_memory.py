"""Turn PyTorch's out-of-memory error into a message that names the settings that would help, and by how much."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.errors import PluginError

Activity = Literal["loading the base model", "training", "evaluating"]

logger = logging.getLogger(__name__)

NAMED = 3
NOTICEABLE = 0.01
"""Settings that save a smaller part of the memory are not named."""
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "bytes": 1}


class GpuMemoryError(PluginError, RuntimeError):
    """The GPU's memory is not enough for what the config asks."""


@contextmanager
def explained_out_of_memory(
    config_obj: Any, activity: Activity, batch: Callable[[], MicroBatch | None] = lambda: None
) -> Iterator[None]:
    """Within the context, running out of GPU memory is an error that says what would help.

    Args:
        config_obj: the validated config of the run.
        activity: what is going on, for the message and for which memory counts.
        batch: returns the micro-batch at work when the error is handled, None when there is none.

    Raises:
        GpuMemoryError: in the place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuMemoryError(explanation(config_obj, activity, str(error), batch())) from error


def explanation(config_obj: Any, activity: Activity, error: str, batch: MicroBatch | None = None) -> str:
    """Return the message for an out-of-memory error of PyTorch's.

    Args:
        config_obj: the validated config of the run.
        activity: what was going on.
        error: PyTorch's message.
        batch: the micro-batch that was at work.
    """
    logger.warning("Out of GPU memory while %s; working out which settings would help.", activity)
    lines = [_what_happened(activity, error, batch)]
    try:
        lines += _advice(config_obj, activity, batch, _amount(error, r"total capacity of"))
    except (PluginError, RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError) as problem:
        # Whatever keeps the estimate from being made, the run's own error is the one to report.
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        lines.append(f"What would help cannot be worked out here ({reason}); try a smaller trainer.batch_size.")
    return "\n".join(lines)


def _what_happened(activity: str, error: str, batch: MicroBatch | None) -> str:
    from ludwig_peft_plugin.estimate.gpu import gib

    asked, capacity, free = (
        _amount(error, pattern) for pattern in (r"Tried to allocate", r"total capacity of", r"of which")
    )
    text = f"The GPU ran out of memory while {activity}"
    if batch is not None:
        text += f" (micro-batch: {len(batch.input_ids):,} tokens in {len(batch.cu_seqlens) - 1:,} sequences)"
    details = [f"it has {gib(capacity)} GiB"] if capacity is not None else []
    details += [f"{gib(free)} GiB were free"] if free is not None else []
    details += [f"{gib(asked)} GiB more were asked for"] if asked is not None else []
    return f"{text}: {', '.join(details)}." if details else f"{text}."


def _amount(text: str, words: str) -> int | None:
    """Return the bytes that stand behind some words of PyTorch's message."""
    match = re.search(rf"{words} (\d+(?:\.\d+)?) ({'|'.join(UNITS)})", text)
    return None if match is None else round(float(match[1]) * UNITS[match[2]])


def _advice(config_obj: Any, activity: Activity, batch: MicroBatch | None, available: int | None) -> list[str]:
    """Return the lines on what would help, by estimates of this config with one setting changed."""
    from ludwig_peft_plugin.estimate.batch import BatchShape, batch_plan
    from ludwig_peft_plugin.estimate.gpu import gib
    from ludwig_peft_plugin.estimate.memory import Estimator
    from ludwig_peft_plugin.estimate.suggest import Case, Memories, suggestions

    estimator = Estimator(config_obj)
    memories = Memories(estimator)
    longest = None if batch is None else batch.max_length
    plan = batch_plan(config_obj, estimator.llm.model_config, row_tokens=longest)
    if activity == "evaluating":
        plan = plan.for_evaluation(config_obj.trainer)
    shape = None if batch is None else BatchShape.of(batch, accumulated=plan.accumulation > 1)
    size = plan.size or 1
    if shape is not None:
        plan, size = plan.matching(shape)
    case = Case(config_obj, plan, size)
    measure = {
        "loading the base model": memories.resident,
        "training": memories.needed,
        "evaluating": memories.needed_to_evaluate,
    }[activity]
    total = measure(case)
    found = [entry for entry in suggestions(case, measure, available) if entry.saves >= NOTICEABLE * total][:NAMED]
    lines = [f"By its estimate this config needs {gib(total)} GiB while {activity}."]
    if not found:
        return [*lines, "No setting of it would lower that much: use a smaller base model or a larger GPU."]
    lines.append("What would help most:")
    lines += [f"  {entry.change.text}  (saves {gib(entry.saves)} GiB, {gib(entry.needed)} GiB then)" for entry in found]
    return [*lines, "`ludwig-peft estimate --config ...` shows where the memory goes."]
