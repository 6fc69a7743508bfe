"""Other values for attributes of modules and classes, for a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, functions: dict[str, Any]) -> Iterator[None]:
    """Within the context, attributes of a module or class have other values."""
    before = {name: vars(owner).get(name) for name in functions}
    for name, function in functions.items():
        getattr(owner, name)  # there must be something to replace
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, original in before.items():
            if original is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)
