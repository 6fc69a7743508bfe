"""LoRA+ in encoders: the option is read from `adapter` of the whole config, where `model_type: ecd` has none."""

from __future__ import annotations

from typing import Any

from ludwig_peft_plugin.errors import AdapterError


def loraplus_ratio(model: Any) -> float | None:
    """Return `loraplus_lr_ratio` of the adapters of a model's encoders, None where there is none.

    Raises:
        AdapterError: they give several, and the optimiser has one for all.
    """
    config = getattr(model, "config_obj", None)
    ratios = {
        ratio
        for feature in getattr(config, "input_features", None) or ()
        if (adapter := getattr(feature.encoder, "adapter", None)) is not None
        if (ratio := getattr(adapter, "loraplus_lr_ratio", None)) is not None
    }
    if len(ratios) > 1:
        values = ", ".join(f"{ratio:g}" for ratio in sorted(ratios))
        raise AdapterError(f"encoder.adapter.loraplus_lr_ratio: give all encoders one value; they have {values}.")
    return ratios.pop() if ratios else None
