"""Adapters of encoders on the backend a model is given, which need not be the one its config names."""

from __future__ import annotations

from typing import Any

from ludwig.constants import MODEL_ECD, TEXT
from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.utils import merge_with_defaults

from ludwig_peft_plugin.config.problems import report
from ludwig_peft_plugin.encoders.config import backend_problems, places


def check_backend(config: dict[str, Any], backend: str) -> None:
    """Raise unless the trainer of a backend can train the adapters of a config's encoders.

    The config of a saved model passes: such a model is there to predict, which every backend can.

    Args:
        config: a whole config, after `normalized`.
        backend: the type of the backend, as `BACKEND_TYPE` of Ludwig's classes says.

    Raises:
        ConfigValidationError: the error that the same backend in the config is.
    """
    found = list(places(merge_with_defaults(config))) if config.get("model_type", MODEL_ECD) == MODEL_ECD else []
    if any(place.saved for place in found):
        return
    problems = [
        problem for place in found if place.feature_type == TEXT for problem in backend_problems(place, backend)
    ]
    if problems:
        raise ConfigValidationError(report(problems))
