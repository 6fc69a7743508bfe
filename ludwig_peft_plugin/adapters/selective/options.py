"""What the options of the selective types have in common: names of modules, and expressions for names."""

from __future__ import annotations

import re
from typing import Any

from ludwig.error import ConfigValidationError

NULL = {"type": "null"}
NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
PATTERN_OR_NAMES: list[dict[str, Any]] = [NAMES, {"type": "string", "minLength": 1}]
EXPECTS_NAMES = "a list of module names or a regular expression over full module names"


def check_expression(option: str, value: object) -> None:
    """Raise unless the value of an option, where it is a string, is a regular expression."""
    if not isinstance(value, str):
        return
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigValidationError(f"adapter.{option}: {value!r} is not a regular expression ({error}).") from error
