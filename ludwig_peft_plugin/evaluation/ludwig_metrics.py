"""Make the text metrics known to Ludwig, by name, direction and the features that have them."""

from __future__ import annotations

from typing import Any

from ludwig.config_validation.checks import get_config_check_registry
from ludwig.constants import MAXIMIZE, MODEL_LLM, RESPONSE, TEXT
from ludwig.error import ConfigValidationError
from ludwig.modules.metric_modules import LudwigMetric
from ludwig.modules.metric_registry import get_metric_registry, register_metric

from ludwig_peft_plugin.config.evaluation import check_evaluation
from ludwig_peft_plugin.evaluation.text_metrics import TEXT_METRICS


class GeneratedTextMetric(LudwigMetric):
    """Stands in Ludwig's registry for a metric of generated answers, which the plugin's predictor computes."""

    @classmethod
    def can_report(cls, feature: Any) -> bool:
        """Return False: text features of other model types have no generated answers."""
        return False


def register_text_metrics() -> None:
    """Register the text metrics and the check of their use with Ludwig. Calling it again does nothing."""
    for name in TEXT_METRICS:
        if name not in get_metric_registry():
            register_metric(name, [TEXT], MAXIMIZE, RESPONSE)(GeneratedTextMetric)
    checks = get_config_check_registry()
    if check_text_metrics not in checks._registry:
        checks.register(check_text_metrics)


def check_text_metrics(config: Any) -> None:
    """Raise where a config uses metrics of generated answers and no such answers would be there.

    Raises:
        ConfigValidationError: names the option and what would work.
    """
    if config.model_type == MODEL_LLM:
        check_evaluation(config)
    elif getattr(config.trainer, "validation_metric", None) in TEXT_METRICS:
        raise ConfigValidationError(
            f"trainer.validation_metric: `{config.trainer.validation_metric}` is made of generated answers, which "
            f"model_type `{config.model_type}` has not; use another metric"
        )
