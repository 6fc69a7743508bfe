"""What stands in the place of functions of Ludwig's: each makes the replacement of the original it is given.

Why each is replaced is said in the list, `_ludwig_compat`. What a replacement needs is imported when it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def load_yaml(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.yaml_paths import load_yaml

    @functools.wraps(original)
    def replacement(config: Any) -> Any:
        return load_yaml(config)

    return replacement


def upgrade_config(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.hyperopt import keep_executor
    from ludwig_peft_plugin.config.shape import check_shape
    from ludwig_peft_plugin.encoders.config import normalized

    @functools.wraps(original)
    def replacement(config: Any) -> Any:
        return keep_executor(original, normalized(check_shape(config)))

    return replacement


def check_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.strict import check_config
    from ludwig_peft_plugin.encoders.config import check_encoders, check_schema

    @functools.wraps(original)
    def replacement(updated_config: dict[str, Any]) -> None:
        # Ludwig's own schema would refuse what is accepted here, such as adapter names in any case.
        if updated_config.get("model_type") == "llm":
            check_config(updated_config)
        else:
            check_encoders(updated_config)
            check_schema(updated_config)

    return replacement


def substitute_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.hyperopt import trial_config

    @functools.wraps(original)
    def replacement(config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        merged = original(config, parameters)
        if config.get("model_type") == "llm":
            merged = trial_config(merged, config, parameters)
        # Ludwig's Optuna executor trains the config it has passed in, not the one it gets back.
        config.clear()
        config.update(merged)
        return config

    return replacement


def get_dataset_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement() -> Any:
        from ludwig_peft_plugin.data.python_codes_25k import added_to

        return added_to(original())

    return replacement


def preprocess_for_training(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.preprocess import preprocess_for_training

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return preprocess_for_training(*args, original=original, **kwargs)

    return replacement


def preprocess_for_prediction(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.preprocess import preprocess_for_prediction

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return preprocess_for_prediction(*args, original=original, **kwargs)

    return replacement


def update_config_with_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.metadata import update_config_with_metadata

    @functools.wraps(original)
    def replacement(config_obj: Any, training_set_metadata: dict[str, Any]) -> None:
        update_config_with_metadata(original, config_obj, training_set_metadata)

    return replacement


def get_experiment_description(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.sources import describe_experiment

    @functools.wraps(original)
    def replacement(config: dict[str, Any], **arguments: Any) -> Any:
        return describe_experiment(original, config, **arguments)

    return replacement


def get_llm_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.base_model import adapter_check_model_config

    @functools.wraps(original)
    def replacement(model_name: str) -> Any:
        return adapter_check_model_config(model_name)

    return replacement


def export_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.editor_schema import export_schema

    return functools.wraps(original)(export_schema(original))


def export_combined_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.editor_schema import export_combined_schema

    return functools.wraps(original)(export_combined_schema(original))


def update_embedding_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.model.llm import PeftLLM

    @functools.wraps(original)
    def replacement(model: Any, config_obj: Any) -> Any:
        if isinstance(model, PeftLLM) and not model.trains_its_embedding:
            return model
        return original(model, config_obj)

    return replacement


def get_optimizer_class_and_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.training.optimizers import supported_arguments

    @functools.wraps(original)
    def replacement(optimizer_config: Any, learning_rate: float) -> Any:
        optimizer, arguments = original(optimizer_config, learning_rate)
        return optimizer, supported_arguments(optimizer, arguments, optimizer_config)

    return replacement


def init_model(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.backend import check_backend

    @functools.wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check_backend(self._user_config, self.backend.BACKEND_TYPE)

    return replacement


def evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.evaluation.ludwig_evaluate import evaluate_and_write
    from ludwig_peft_plugin.model.llm import PeftLLM

    @functools.wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model, PeftLLM):
            return original(self, *args, **kwargs)
        return evaluate_and_write(original, self, *args, **kwargs)

    return replacement


def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.model.direct import generate_texts
    from ludwig_peft_plugin.model.llm import PeftLLM

    @functools.wraps(original)
    def replacement(
        self: Any,
        input_strings: str | list[str],
        generation_config: dict[str, Any] | None = None,
        streaming: bool | None = False,
        callbacks: Any = None,
    ) -> Any:
        if not isinstance(self.model, PeftLLM):
            return original(self, input_strings, generation_config, streaming, callbacks)
        return generate_texts(self.model, input_strings, generation_config, streaming=bool(streaming))

    return replacement


def initialize_encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.build import initialize_encoder

    @functools.wraps(original)
    def replacement(self: Any, encoder_config: Any) -> Any:
        return initialize_encoder(original, self, encoder_config)

    return replacement


def get_embedding_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.build import embedding_layer

    @functools.wraps(original)
    def replacement(self: Any) -> Any:
        return embedding_layer(self)

    return replacement


def create_tune_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.training.search_checkpoint import load_best_first

    @functools.wraps(original)
    def replacement(save_path: str) -> Any:
        checkpoint = original(save_path)
        load_best_first(checkpoint.path)
        return checkpoint

    return replacement


def get_loraplus_lr_ratio(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.optimizer import loraplus_ratio

    @functools.wraps(original)
    def replacement(model: Any) -> float | None:
        ratio: float | None = original(model)
        return loraplus_ratio(model) if ratio is None else ratio

    return replacement
