"""Answer rows that name adapters of their own, without loading the base again: in groups, or mixed in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ludwig_peft_plugin.adapters.several.active import BASE, active_names, use_adapter

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ludwig_peft_plugin.model.generation import Answer

MIXED_BELOW = 16
"""Adapters with fewer rows than this share batches; those with more fill batches of their own, which run faster."""

PEFT_BASE = "__base__"
"""PEFT's name for no adapter, in a mixed batch."""


def groups(names: Sequence[str | None] | None, rows: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield each adapter that rows name, None for the active one, with those of `rows`, in the order they appear in.

    Args:
        names: the adapter of each row of the data; None where rows name none.
        rows: the rows wanted, shape (n,).
    """
    if names is None:
        yield None, rows
        return
    chosen = [names[row] for row in rows]
    for name in dict.fromkeys(chosen):
        yield name, rows[[other == name for other in chosen]]


def using(model: Any, name: str | None) -> Any:
    """Return a context in which the named adapter answers, or the active one where `name` is None."""
    return nullcontext() if name is None else use_adapter(model, name)


def can_mix(model: PeftModel, names: Sequence[str]) -> bool:
    """Return whether PEFT computes rows of these adapters in one batch: LoRA and RoAd, but not DoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model.base_model, "_enable_peft_forward_hooks") or len(active_names(model)) > 1:
        return False
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(
        hasattr(layer, "_mixed_batch_forward") and not any(getattr(layer, "use_dora", {}).get(name) for name in names)
        for layer in layers
    )


def generate_by_adapter(
    model: PeftModel,
    prompts: Sequence[np.ndarray],
    names: Sequence[str | None],
    config: Any,
    *,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return an answer to each prompt by the adapter it names, in the order of `prompts`.

    Args:
        model: the model with the adapters, in evaluation mode.
        prompts: token ids of each prompt.
        names: the adapter of each prompt; None is the active one, "base" none.
        config: transformers' generation settings.
        device: where the model is.
        progress: called with the number of answers that have become whole.
    """
    from ludwig_peft_plugin.model.generation import Answer, generate_answers
    from ludwig_peft_plugin.model.padded_generation import generate_padded

    answers: dict[int, Answer] = {}
    found = list(groups(names, np.arange(len(prompts))))
    small = [(name, rows) for name, rows in found if len(rows) < MIXED_BELOW]
    if len(small) < 2 or not can_mix(model, [name for name, _ in small if name is not None]):
        small = []
    together = {id(rows) for _, rows in small}
    for name, rows in found:
        if id(rows) in together:
            continue
        with using(model, name):
            made = generate_answers(model, [prompts[row] for row in rows], config, device=device, progress=progress)
        answers |= zip(rows.tolist(), made, strict=True)
    if small:
        mixed = np.concatenate([rows for _, rows in small])
        active = active_names(model)[0] if active_names(model) else BASE
        by_row = [PEFT_BASE if (names[row] or active) == BASE else names[row] or active for row in mixed]
        filled = [prompts[row] if len(prompts[row]) else np.array([config.eos_token_id[0]]) for row in mixed]
        padded = generate_padded(model, filled, config, device=device, progress=progress, adapter_names=by_row)
        answers |= zip(mixed.tolist(), (Answer(*one) for one in padded), strict=True)
    return [answers[row] for row in range(len(prompts))]
