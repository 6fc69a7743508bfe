"""What an export was asked to be and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.model.base_model import PRECISIONS


@dataclass(frozen=True)
class ExportOptions:
    """One entry of the config's `export` list.

    `path` is relative to the run directory. `dtype` is that of the stored weights, None for the one the model was
    trained in. `tolerance` is the largest difference accepted (see `verify.py`), None for the dtype's default.
    `adapter` is one of several adapters, None for what is active.
    """

    format: str
    path: str
    dtype: torch.dtype | None = None
    tolerance: float | None = None
    adapter: str | None = None

    @classmethod
    def from_config(cls, entry: Any) -> ExportOptions:
        """Read an entry of `config_obj.export`: an object with attributes, a mapping, or only the format's name."""
        if isinstance(entry, str):
            entry = {"format": entry}
        values = entry if isinstance(entry, Mapping) else vars(entry)
        name = values["format"]
        dtype = values.get("dtype") or "auto"
        if dtype != "auto" and dtype not in PRECISIONS:
            raise ExportError(f"export.dtype: {dtype!r} is not one of auto, {', '.join(PRECISIONS)}.")
        tolerance = values.get("tolerance")
        if tolerance is not None and not tolerance >= 0:
            raise ExportError(f"export.tolerance: {tolerance} must not be negative.")
        adapter = values.get("adapter")
        path = values.get("path") or "/".join(part for part in ("exported", adapter, name) if part)
        return cls(name, path, PRECISIONS.get(dtype), tolerance, adapter)


@dataclass(frozen=True)
class Comparison:
    """The logits of an export beside the trained model's, over some prompts.

    Attributes:
        max_abs_difference: the largest difference of two logits.
        relative_difference: the same in units of the standard deviation of the trained model's logits.
        mean_kl: Kullback-Leibler divergence KL(trained || exported) of the next token, in nats, mean over tokens.
        tokens: positions compared.
    """

    max_abs_difference: float
    relative_difference: float
    mean_kl: float
    tokens: int


@dataclass(frozen=True)
class Written:
    """Weights on disk: their dtype, and the share of the adapter's change that rounding to it left (None: all)."""

    dtype: torch.dtype
    change_kept: float | None = None


@dataclass(frozen=True)
class ExportResult:
    """An export that was written and verified. `dtype` is that of the stored weights, `seconds` the whole time.

    `change_kept` is the share of the adapter's change of the weights that is left after rounding, where that applies.
    """

    format: str
    folder: str
    dtype: str
    comparison: Comparison
    tolerance: float
    seconds: float
    change_kept: float | None = None

    @property
    def max_abs_difference(self) -> float:
        """The largest difference of a logit from the trained model's."""
        return self.comparison.max_abs_difference

    @property
    def mean_kl(self) -> float:
        """The mean Kullback-Leibler divergence from the trained model's next-token distribution, in nats."""
        return self.comparison.mean_kl
