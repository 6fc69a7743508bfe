"""The `export` section: what is written, beside the Ludwig model, when training ends."""

from __future__ import annotations

from typing import Any

from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from pydantic import Field


def export_formats() -> list[str]:
    """Return the names of the export formats there are."""
    import ludwig_peft_plugin.export.run  # noqa: F401  (the built-in formats register themselves)
    from ludwig_peft_plugin.export.formats import format_names

    return format_names()


def check_exports(config_obj: Any) -> None:
    """Raise what can be known to be wrong with a config's exports before training.

    Raises:
        ConfigValidationError: a path leaves the run's folder, two exports share one, or the model cannot be written so.
    """
    if not config_obj.export:
        return
    from ludwig_peft_plugin.errors import ExportError
    from ludwig_peft_plugin.export import run

    try:
        run.check_exports(config_obj)
    except ExportError as error:
        raise ConfigValidationError(str(error)) from None


class FormatField(schema_utils.SchemaField):
    """The name of an export format; formats can be added, so the names are looked up when they are needed."""

    description = (
        "What to write: `adapter` is a folder for peft, `merged` a full model for transformers with the adapter "
        "folded into the base's weights (a quantised base is dequantised first), `adapterhub` a folder for "
        "AdapterHub's library `adapters` (bottleneck adapters only)."
    )

    @property
    def expects(self) -> str:
        """The values there are, in words."""
        return "one of " + ", ".join(f"`{name}`" for name in export_formats())

    def get_default_field(self) -> Any:
        """Return the field; the format has to be given."""
        info: Any = Field(description=self.description)
        info.metadata = [schema_utils._LegacyFieldMarker(self)]
        return info

    def _deserialize(self, value: Any, attr: str, data: Any, **_: Any) -> str:
        if value not in export_formats():
            raise ConfigValidationError(f"export.format: {value!r} is not allowed; give {self.expects}")
        return str(value)

    def _jsonschema_type_mapping(self) -> dict[str, Any]:
        return {"type": "string", "enum": export_formats(), "description": self.description}


class ExportConfig(schema_utils.LudwigBaseConfig):
    """One folder to write after training."""

    format: str = FormatField().get_default_field()
    path: str | None = schema_utils.String(
        default=None,
        allow_none=True,
        description="The folder to write, inside the run's folder. Null is `exported/<format>`, or for one of several "
        "adapters `exported/<adapter>/<format>`.",
    )
    adapter: str | None = schema_utils.String(
        default=None,
        allow_none=True,
        description="Which of the `adapters` to write or fold in. Null is the active one.",
    )
    dtype: str = schema_utils.StringOptions(
        options=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        description="The number format of the weights on disk; `auto` keeps that of training.",
    )
    tolerance: float | None = schema_utils.NonNegativeFloat(
        default=None,
        allow_none=True,
        description=(
            "How far a logit of the written model may be from the trained one's, in standard deviations of the logits, "
            "before the export is an error. Null takes the bound that fits the number format."
        ),
    )


class ExportField(schema_utils.SchemaField):
    """A list of exports; a bare text in it is a format."""

    description = "The folders to write after training, each checked against the trained model."

    def get_default_field(self) -> Any:
        """Return the field with an empty list as its default."""
        info: Any = Field(default_factory=list, description=self.description)
        info.metadata = [schema_utils._LegacyFieldMarker(self)]
        return info

    def _deserialize(self, value: Any, attr: str, data: Any, **_: Any) -> list[ExportConfig]:
        if not isinstance(value, list):
            raise ConfigValidationError("export: must be a list, such as [{format: adapter}, {format: merged}]")
        entries = [{"format": entry} if isinstance(entry, str) else entry for entry in value]
        return [e if isinstance(e, ExportConfig) else ExportConfig.model_validate(e) for e in entries]

    def _jsonschema_type_mapping(self) -> dict[str, Any]:
        entry = schema_utils.unload_jsonschema_from_config_class(ExportConfig, additional_properties=False)
        names = {"type": "string", "enum": export_formats()}
        return {"type": "array", "items": {"anyOf": [names, entry]}, "description": self.description, "default": []}
