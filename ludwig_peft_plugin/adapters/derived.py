"""What all adapter types have in common whose options are derived from a config class of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ludwig.error import ConfigValidationError
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.adapters.peft_options import not_offered, own_fields
from ludwig_peft_plugin.adapters.peft_schema import Values


class DerivedConfig(AdapterConfig):
    """A type that names a method of PEFT and states what it does otherwise.

    Attributes:
        peft_type: the method's name in PEFT's registry.
        title: its name as users know it.
        summary: what it does, in a sentence or two.
        renamed: option by field of the PEFT config, where Ludwig has another name for it.
        removed: fields of the PEFT config that are no option, with the reason.
        removed_from_all: the same for all types of a kind.
        defaults: defaults by option, where ours differ from PEFT's.
        texts: descriptions by option, where PEFT's help does not serve.
        values: values an option takes, where PEFT's annotation does not say.
    """

    peft_type: ClassVar[str] = ""
    title: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}
    removed: ClassVar[dict[str, str]] = {}
    removed_from_all: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[dict[str, Any]] = {}
    texts: ClassVar[dict[str, str]] = {}
    values: ClassVar[dict[str, Values]] = {}

    def __post_init__(self) -> None:
        """Refuse options that contradict each other or can have no effect."""
        for problem in self.problems():
            raise ConfigValidationError(f"adapter.{problem}")

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return cls.title

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a sentence or two."""
        return cls.summary

    @classmethod
    def peft_config(cls) -> type[PeftConfig]:
        """Return the method's config class in PEFT."""
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(cls.peft_type)]

    @classmethod
    def not_offered(cls) -> dict[str, str]:
        """Return the fields of the PEFT config that are no option, with the reason."""
        return not_offered(cls.peft_config(), {**cls.removed_from_all, **cls.removed}, cls.renamed)

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        return []

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of the PEFT config, by PEFT's names; what is null is left to PEFT."""
        arguments = {}
        for name in own_fields(self.peft_config()):
            value = getattr(self, self.renamed.get(name, name), None)
            if value is not None and name not in self.removed and name not in self.removed_from_all:
                arguments[name] = value
        return arguments
