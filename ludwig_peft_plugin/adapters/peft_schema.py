"""What values a field of a PEFT config takes: a JSON schema and the words for it, from the field's annotation."""

from __future__ import annotations

import enum
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}


@dataclass(frozen=True)
class Values:
    """Which values an option takes.

    Attributes:
        schema: JSON schema (draft 7) of a value.
        expects: completes the sentence "it must be ...".
    """

    schema: dict[str, Any]
    expects: str

    def or_null(self) -> Values:
        """Return these values and null."""
        return self if _takes_null(self.schema) else Values({"anyOf": [self.schema, NULL.schema]}, self.expects)


class UnknownKindError(Exception):
    """A field's annotation is of no kind that a YAML file can hold, as a class of settings or a function."""


def _takes_null(schema: dict[str, Any]) -> bool:
    return schema == {"type": "null"} or any(_takes_null(part) for part in schema.get("anyOf", []))


NULL = Values({"type": "null"}, "null")
BOOLEAN = Values({"type": "boolean"}, "true or false")
TEXT = Values({"type": "string", "minLength": 1}, "a text")
INTEGER = Values({"type": "integer"}, "an integer")
POSITIVE = Values({"type": "integer", "minimum": 1}, "an integer of at least 1")
NOT_NEGATIVE = Values({"type": "integer", "minimum": 0}, "an integer of at least 0")
NUMBER = Values({"type": "number"}, "a number")
ABOVE_ZERO = Values({"type": "number", "exclusiveMinimum": 0}, "a number above 0")
ZERO_OR_MORE = Values({"type": "number", "minimum": 0}, "a number of at least 0")
SHARE = Values({"type": "number", "minimum": 0, "maximum": 1}, "a number from 0 to 1")
DROPOUT = Values({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number from 0 to below 1")
SEED = Values({"type": "integer", "minimum": 0}, "an integer of at least 0")
SIZES = Values(
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
    "a mapping from module names to integers of at least 1",
)
SCALES = Values(
    {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
    "a mapping from module names to numbers above 0",
)


def one_of(*choices: Any) -> Values:
    """Return the values `choices`."""
    return Values({"enum": list(choices)}, f"one of {', '.join(str(choice) for choice in choices)}")


COMMON: dict[str, Values] = {
    "target_modules": Values(
        {"anyOf": [NAMES, TEXT.schema, NULL.schema]},
        "a list of module names, a regular expression over full module names, or all-linear",
    ),
    "exclude_modules": Values(
        {"anyOf": [NAMES, TEXT.schema, NULL.schema]},
        "a list of module names or a regular expression over full module names",
    ),
    "modules_to_save": Values({"anyOf": [NAMES, NULL.schema]}, "a list of module names"),
    "layers_to_transform": Values(
        {
            "anyOf": [
                {"type": "array", "items": NOT_NEGATIVE.schema, "minItems": 1},
                NOT_NEGATIVE.schema,
                NULL.schema,
            ]
        },
        "a layer number or a list of them, from 0",
    ),
    "layers_pattern": Values(
        {"anyOf": [NAMES, TEXT.schema, NULL.schema]}, "the name of the list of layers in the model, or several"
    ),
    "rank_pattern": SIZES.or_null(),
    "alpha_pattern": SCALES.or_null(),
    "alpha": ABOVE_ZERO,
}
"""Values of fields that mean the same in every method, where PEFT's annotation says too little."""


def values_of(name: str, annotation: Any, default: Any, help_text: str = "") -> Values:
    """Return which values the field `name` of a PEFT config takes.

    PEFT annotates types and no bounds. A number whose default is positive must be positive, one whose default is zero
    must not be negative, and a dropout is below 1; other bounds are stated by the type that has the option.

    Raises:
        UnknownKindError: the annotation is not one of a plain value.
    """
    if name in COMMON:
        return COMMON[name] if default is not None else COMMON[name].or_null()
    if name == "bias" and annotation is str:
        return one_of("none", "all", *re.findall(r"'(\w+_only)'", help_text))
    if name.endswith("_pattern") and _is_mapping(annotation):
        whole = name.removesuffix("_pattern").endswith(("size", "frequency", "rank"))
        return (SIZES if whole else SCALES).or_null()
    if name.endswith("_alpha") and default is not None and annotation in (int, float):
        return ABOVE_ZERO
    found = _plain(annotation, name, default)
    return found.or_null() if default is None else found


def _plain(annotation: Any, name: str, default: Any) -> Values:
    """Return the values of an annotation; `name` and `default` say which bounds a number has."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    simple = {bool: BOOLEAN, str: TEXT, type(None): NULL, None: NULL, dict: Values({"type": "object"}, "a mapping")}
    if annotation in simple:
        return simple[annotation]
    if annotation in (int, float):
        return _number(annotation, name, default)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return one_of(*(member.value for member in annotation))
    if origin is typing.Literal:
        return one_of(*arguments)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain(part, name, default) for part in arguments]
        words = dict.fromkeys(part.expects for part in parts if part is not NULL)
        return Values({"anyOf": [part.schema for part in parts]}, ", or ".join(words))
    if origin is list and len(arguments) == 1:
        item = _plain(arguments[0], name, None)
        return Values({"type": "array", "items": item.schema}, f"a list, each {item.expects}")
    if origin is dict and len(arguments) == 2:
        item = _plain(arguments[1], name, None)
        return Values({"type": "object", "additionalProperties": item.schema}, f"a mapping to {item.expects}")
    raise UnknownKindError(f"{annotation}")


def _number(annotation: type, name: str, default: Any) -> Values:
    if name.endswith(("dropout", "_p")):
        return DROPOUT
    if not isinstance(default, int | float) or isinstance(default, bool) or default < 0:
        return INTEGER if annotation is int else NUMBER
    if annotation is int:
        return POSITIVE if default > 0 else NOT_NEGATIVE
    return ABOVE_ZERO if default > 0 else ZERO_OR_MORE


def _is_mapping(annotation: Any) -> bool:
    parts = typing.get_args(annotation) or (annotation,)
    return any(part is dict or typing.get_origin(part) is dict for part in parts)
