"""Register the plugin with Ludwig: its config class, model class, trainers, predictor and adapters."""

from __future__ import annotations

import threading

from ludwig_peft_plugin import _autoload, versions

_lock = threading.RLock()
_registered = False


def register() -> None:
    """Make `model_type: llm` of Ludwig resolve to this plugin. Calling it again does nothing.

    Called by itself when Ludwig is imported (see `_autoload`); call it yourself where a `.pth` file is not read.

    Raises:
        UnsupportedVersionError: Ludwig, torch, transformers or peft is outside the supported range.
        LudwigChangedError: something of Ludwig's that the plugin replaces has changed.
    """
    global _registered
    with _lock:
        if _registered:
            return
        _autoload.uninstall()
        versions.check()
        from ludwig_peft_plugin._ludwig_compat import replacements
        from ludwig_peft_plugin._replace import apply

        apply(replacements())
        _fill_registries()
        _registered = True


def is_registered() -> bool:
    """Return whether Ludwig's `model_type: llm` is this plugin's."""
    return _registered


def _fill_registries() -> None:
    import ludwig.trainers  # noqa: F401  (fills the trainer registries, which ours then replace)
    from ludwig.config_validation.checks import get_config_check_registry
    from ludwig.config_validation.validation import get_schema
    from ludwig.encoders.registry import get_encoder_registry
    from ludwig.models.predictor import _predictor_registry
    from ludwig.models.registry import model_type_registry
    from ludwig.schema.model_types.base import model_type_schema_registry
    from ludwig.trainers.registry import get_llm_trainers_registry, get_trainers_registry

    import ludwig_peft_plugin.adapters  # noqa: F401  (each adapter registers itself)
    from ludwig_peft_plugin.config.checks import install_checks
    from ludwig_peft_plugin.config.llm_config import LLMConfig
    from ludwig_peft_plugin.config.trainer import register_trainer_config
    from ludwig_peft_plugin.encoders.llm_encoder import PeftLLMEncoder
    from ludwig_peft_plugin.encoders.trainer import EcdTrainer
    from ludwig_peft_plugin.evaluation.ludwig_metrics import register_text_metrics
    from ludwig_peft_plugin.evaluation.predictor import create_predictor
    from ludwig_peft_plugin.model.llm import create_llm
    from ludwig_peft_plugin.training.inference import PeftInferenceTrainer
    from ludwig_peft_plugin.training.trainer import PeftTrainer

    model_type_schema_registry["llm"] = LLMConfig
    model_type_registry["llm"] = create_llm
    get_encoder_registry()["text"]["llm"] = PeftLLMEncoder
    register_trainer_config()
    get_trainers_registry()["ecd"] = EcdTrainer
    get_llm_trainers_registry()["finetune"] = PeftTrainer
    get_llm_trainers_registry()["none"] = PeftInferenceTrainer
    _predictor_registry["llm"] = create_predictor
    install_checks(get_config_check_registry()._registry)
    register_text_metrics()
    get_schema.cache_clear()  # a schema made before registration would not know our fields
