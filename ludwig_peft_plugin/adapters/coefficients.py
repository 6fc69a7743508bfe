"""What the methods that train some coefficients of an update's transform (Fourier, wavelets) have in common."""

from __future__ import annotations

from typing import Any

from ludwig_peft_plugin.adapters.shapes import Shapes
from ludwig_peft_plugin.adapters.targets import matches_pattern
from ludwig_peft_plugin.errors import AdapterError


def fitted_frequencies(adapter: Any, shapes: Shapes, usual: int) -> dict[str, Any]:
    """Choose `n_frequency`, `usual` or half of what the smallest layer has, and check what is given.

    Raises:
        AdapterError: a layer has fewer coefficients.
    """
    patterns = adapter.n_frequency_pattern or {}
    number = adapter.n_frequency or max(1, min(usual, min(i * o for i, o in shapes.values()) // 2))
    for name, (inputs, outputs) in shapes.items():
        key = next((key for key in patterns if matches_pattern(name, key)), None)
        asked = number if key is None else patterns[key]
        if asked > inputs * outputs:
            option = "n_frequency" if key is None else f"n_frequency_pattern.{key}"
            raise AdapterError(
                f"adapter.{option}: {asked} is more than the {inputs * outputs} coefficients of {name!r}; give fewer."
            )
    return {"n_frequency": number}
