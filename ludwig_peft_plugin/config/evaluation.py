"""The `evaluation` section: how generated answers are scored, and when they are generated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ludwig.constants import TEXT, TRAINING
from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from pydantic import Field

from ludwig_peft_plugin.evaluation.text_metrics import LANGUAGES, TEXT_METRICS

PARSES = "parses"
NAMES = tuple(name for name in TEXT_METRICS if name != PARSES)


class TextMetricsField(schema_utils.SchemaField):
    """A list of names of text metrics."""

    description = "The scores of generated answers, each a line in docs/evaluation.md. An empty list switches them off."
    expects = f"a list of {', '.join(f'`{name}`' for name in NAMES)}"

    def get_default_field(self) -> Any:
        """Return the field with all metrics as its default."""
        info: Any = Field(default_factory=lambda: list(NAMES), description=self.description)
        info.metadata = [schema_utils._LegacyFieldMarker(self)]
        return info

    def _deserialize(self, value: Any, attr: str, data: Any, **_: Any) -> list[str]:
        if not isinstance(value, list) or any(name not in NAMES for name in value):
            raise ConfigValidationError(f"evaluation.metrics: {value!r} is not allowed; give {self.expects}")
        return list(dict.fromkeys(value))

    def _jsonschema_type_mapping(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": {"type": "string", "enum": list(NAMES)},
            "description": self.description,
            "default": list(NAMES),
        }


class EvaluationConfig(schema_utils.LudwigBaseConfig):
    """How generated answers are scored, and when they are generated beside the loss."""

    metrics: list[str] = TextMetricsField().get_default_field()

    language: str | None = schema_utils.StringOptions(
        options=list(LANGUAGES),
        default=None,
        allow_none=True,
        description=(
            "What answers are code of. Adds the metric `parses`, the share of answers that parse; none is executed."
        ),
    )

    during_training: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether answers are generated and scored at each evaluation of the validation and test set while training "
            "too. `ludwig evaluate` and `ludwig experiment` always do."
        ),
    )

    rows: int | None = schema_utils.PositiveInteger(
        default=None,
        allow_none=True,
        description="How many rows of a set are generated for while training, from its start. Null is all.",
    )

    examples: int = schema_utils.NonNegativeInteger(
        default=20,
        description=(
            "How many answers, spread over the set, are written beside the statistics to read (`examples.md`, "
            "`examples.jsonl`)."
        ),
    )

    @property
    def reported(self) -> list[str]:
        """Names of the metrics that are computed."""
        return [*self.metrics, *([PARSES] if self.language else [])]


def check_evaluation(config: Any) -> None:
    """Raise where a config asks for scores of answers that would not be generated.

    Args:
        config: an LLM config object.

    Raises:
        ConfigValidationError: names the option and what would work.
    """
    evaluation, trains = config.evaluation, config.trainer.type != "none"
    if config.output_features[0].type != TEXT:
        if evaluation.to_dict() != EvaluationConfig().to_dict():
            raise ConfigValidationError("evaluation: is for text answers; remove it")
        return
    if evaluation.during_training and not trains:
        raise ConfigValidationError(
            "evaluation.during_training: trainer.type `none` does not train; `ludwig evaluate` scores answers anyway"
        )
    if evaluation.rows is not None and not evaluation.during_training:
        raise ConfigValidationError(
            "evaluation.rows: is only read while training; give during_training: true too, or remove it"
        )
    for option, name, split in _decisive(config.trainer) if trains else ():
        if name not in TEXT_METRICS:
            continue
        if name not in evaluation.reported:
            missing = "evaluation.language" if name == PARSES else f"`{name}` in evaluation.metrics"
            raise ConfigValidationError(f"{option}: `{name}` is not computed; give {missing} too")
        if not evaluation.during_training:
            raise ConfigValidationError(
                f"{option}: `{name}` is made of generated answers, and none are generated while training; give "
                "evaluation.during_training: true, or use loss"
            )
        if split == TRAINING:
            raise ConfigValidationError(
                f"{option}: `{name}` is not computed on the training set; use the split `validation`"
            )


def _decisive(trainer: Any) -> Iterator[tuple[str, str, str | None]]:
    """Yield the options by which a metric steers the training: path, metric and the split it is taken from."""
    yield "trainer.validation_metric", trainer.validation_metric, None
    schedule = getattr(trainer, "learning_rate_scheduler", None)
    if schedule and schedule.reduce_on_plateau:
        path = "trainer.learning_rate_scheduler.reduce_eval_metric"
        yield path, schedule.reduce_eval_metric, schedule.reduce_eval_split
    if getattr(trainer, "increase_batch_size_on_plateau", 0):
        path = "trainer.increase_batch_size_eval_metric"
        yield path, trainer.increase_batch_size_eval_metric, trainer.increase_batch_size_eval_split
