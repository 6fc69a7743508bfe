"""Which of our types makes which PEFT config, for code that has a config and no type: a stored adapter's, a merge's."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, Any] = {}
"""The class of our type (a `PeftMethod`) by PEFT's name of the method (`LOHA`, ...)."""


def method_of(config: Any) -> Any:
    """Return the class that describes the method of a PEFT config, None for methods with types of another kind."""
    return METHODS.get(getattr(config.peft_type, "value", config.peft_type))
