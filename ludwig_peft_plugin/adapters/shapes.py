"""Sizes of the layers that get an adapter: what divides all of them, and errors for what does not."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from ludwig_peft_plugin.errors import AdapterError

Shapes = dict[str, tuple[int, int]]
"""(inputs, outputs) of each layer that gets an adapter, by its full name."""


def shapes_of(base: nn.Module, names: Iterable[str]) -> Shapes:
    """Return the sizes of the layers `names`, the same for plain and quantised ones."""
    return {name: _shape(base.get_submodule(name)) for name in names}


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        return int(inputs), int(outputs)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def inputs(shapes: Shapes) -> dict[str, int]:
    """Return the number of inputs of each layer."""
    return {name: shape[0] for name, shape in shapes.items()}


def outputs(shapes: Shapes) -> dict[str, int]:
    """Return the number of outputs of each layer."""
    return {name: shape[1] for name, shape in shapes.items()}


def both(shapes: Shapes) -> dict[str, int]:
    """Return, for each layer, a number that is divided by exactly what divides its inputs and its outputs."""
    return {name: math.gcd(*shape) for name, shape in shapes.items()}


def largest_common(sizes: dict[str, int], limit: int) -> int:
    """Return the largest power of two up to `limit` that divides all `sizes`, else their largest common divisor."""
    common = math.gcd(*sizes.values()) if sizes else limit
    power = min(common & -common, 1 << (limit.bit_length() - 1))
    return power if power > 1 else max(divisor for divisor in divisors(common) if divisor <= limit)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def check_divides(option: str, value: int, sizes: dict[str, int], what: str) -> None:
    """Raise unless `value` divides all `sizes`.

    Args:
        option: the option's name in the adapter section.
        value: its value.
        sizes: by layer.
        what: which size that is, as "inputs".

    Raises:
        AdapterError: names a layer whose size it does not divide, and values that would do.
    """
    for name, size in sizes.items():
        if size % value:
            fitting = [divisor for divisor in divisors(math.gcd(*sizes.values())) if divisor > 1][-5:]
            would_do = ", ".join(map(str, fitting)) or "none but 1"
            raise AdapterError(
                f"adapter.{option}: {value} does not divide the {size} {what} of {name!r}. For the layers chosen with "
                f"target_modules these would do: {would_do}."
            )


def check_rank(option: str, value: int, shapes: Shapes) -> None:
    """Raise if `value` is above the rank that a matrix of the smallest layer can have."""
    name, shape = min(shapes.items(), key=lambda entry: min(entry[1]))
    if value > min(shape):
        raise AdapterError(
            f"adapter.{option}: {value} is more than the {min(shape)} singular values of {name!r}; give at most "
            f"{min(shape)}, or leave the module out of target_modules."
        )
