"""Merge named adapters into one more by weights, where their method has a way to."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from ludwig_peft_plugin.adapters.peft_build import translated_warnings
from ludwig_peft_plugin.adapters.several.active import parameters_of
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel, PeftType

SEED = 0
"""Of the merges that drop changes at random (DARE), so that merging the same adapters again gives the same."""

PRUNING = ("ties", "dare", "magnitude_prune")
"""How the names of the combinations begin that keep only a part of the changes, `density`."""


def combinations(peft_type: PeftType) -> tuple[str, ...]:
    """Return the ways in which PEFT merges adapters of a method, none where it cannot."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    merge = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type), "add_weighted_adapter", None)
    parameters = inspect.signature(merge).parameters if merge is not None else {}
    if "weights" not in parameters:  # a method that only raises takes anything
        return ()
    if "combination_type" not in parameters:
        return ("linear",)
    # PEFT says which there are in the annotation, a `Literal`, which may be text.
    return tuple(re.findall(r"""["'](\w+)["']""", str(parameters["combination_type"].annotation)))


def add_merged(model: PeftModel, merge: Any) -> None:
    r"""Add the adapter `merge.name`, made of others; one of this name is made anew. What is active stays so.

    With `cat` the new adapter's change is exactly \(\sum_i w_i \Delta W_i\), at the sum of the ranks; `svd` is its best
    approximation at the largest rank; `linear` adds up the factors, which is cheap and rough; the others are TIES
    (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099) and pruning by magnitude.

    Args:
        model: has the sources.
        merge: a `MergeConfig`.

    Raises:
        AdapterError: the method cannot merge so, or the sources do not fit together.
    """
    sources, how = list(merge.sources), merge.combination_type
    kind = model.peft_config[sources[0]].peft_type
    known = combinations(kind)
    if how not in known:
        raise AdapterError(f"adapters.merge: {_cannot(kind.value.lower(), how, known)}")
    arguments: dict[str, Any] = {"weights": list(merge.weights or [1.0] * len(sources)), "adapter_name": merge.name}
    if len(known) > 1:
        arguments["combination_type"] = how
    if how.startswith(PRUNING):
        arguments["density"] = merge.density
    active = list(model.active_adapters)
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if merge.name in model.peft_config:
        model.delete_adapter(merge.name)
    cuda = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cuda), translated_warnings():
        torch.manual_seed(SEED)
        try:
            model.base_model.add_weighted_adapter(sources, **arguments)
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise AdapterError(
                f"adapters.merge: {', '.join(sources)} cannot be merged with combination_type: {how}: "
                f"{' '.join(str(error).split())}"
            ) from error
    for parameter in parameters_of(model, merge.name):
        # Of a truncated SVD they are views, which would keep all singular vectors in memory.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    if list(model.active_adapters) != active:
        model.base_model.set_adapter(active)
    for parameter, wanted in gradients.items():
        parameter.requires_grad_(wanted)


def _cannot(kind: str, how: str, known: tuple[str, ...]) -> str:
    if not known:
        return f"adapters of the method {kind} cannot be merged by weights; switch between them instead"
    return f"combination_type: {how} does not exist for the method {kind}; use one of {', '.join(known)}"
