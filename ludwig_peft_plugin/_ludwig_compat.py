"""Every function of Ludwig's that the plugin replaces because no registry reaches it, each with its reason.

An entry also names the parameters its replacement relies on: when Ludwig changes one, registering raises
`LudwigChangedError` and replaces nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from ludwig_peft_plugin._replace import Replacement


def replacements() -> list[Replacement]:
    """Return what is replaced in Ludwig beside its registries, each with its reason."""
    return [
        Replacement(
            "ludwig.utils.data_utils",
            "load_yaml",
            ("yaml_fp",),
            "relative dataset paths of a YAML file are meant from the file's folder, which is lost after reading",
            _load_yaml,
        ),
        Replacement(
            "ludwig.utils.data_utils",
            "load_config_from_str",
            ("config",),
            "the same for a config given as text, whose paths are meant from the working directory",
            _load_yaml,
        ),
        Replacement(
            "ludwig.utils.backward_compatibility",
            "upgrade_config_dict_to_latest_version",
            ("config",),
            "a config of the wrong shape, such as one without features, fails in it with a KeyError",
            _upgrade_config,
        ),
        Replacement(
            "ludwig.config_validation.validation",
            "check_schema",
            ("updated_config",),
            "unknown keys pass and wrong values print whole schemas",
            _check_schema,
        ),
        Replacement(
            "ludwig.hyperopt.utils",
            "substitute_parameters",
            ("config", "parameters"),
            "options of another adapter type stay in a trial's config, and the Optuna executor drops what it returns",
            _substitute_parameters,
        ),
        Replacement(
            "ludwig.datasets",
            "_get_dataset_configs",
            (),
            "a dataset of ours is added to the list when it is first read: reading its 590 files takes seconds",
            _get_dataset_configs,
        ),
        Replacement(
            "ludwig.data.preprocessing",
            "preprocess_for_training",
            ("config", "dataset", "training_set", "validation_set", "test_set", "data_format", "backend"),
            "tokens must not be padded, cut and filled, and the YAML names the dataset",
            _preprocess_for_training,
        ),
        Replacement(
            "ludwig.data.preprocessing",
            "preprocess_for_prediction",
            ("config", "dataset", "training_set_metadata", "data_format", "split", "include_outputs", "backend"),
            "the same for prediction, which fails for tokenizers without an unknown token",
            _preprocess_for_prediction,
        ),
        Replacement(
            "ludwig.features.feature_registries",
            "update_config_with_metadata",
            ("config_obj", "training_set_metadata"),
            "it copies the whole vocabulary into the config and the metadata, several times",
            _update_config_with_metadata,
        ),
        Replacement(
            "ludwig.experiment_utils",
            "get_experiment_description",
            ("config", "dataset", "training_set", "validation_set", "test_set", "data_format"),
            "it fails where no dataset is given as an argument, though the YAML names one",
            _get_experiment_description,
        ),
        Replacement(
            "ludwig.config_validation.checks",
            "_get_llm_model_config",
            ("model_name",),
            "it asks transformers for the base model's name, which does not know the shipped model",
            _get_llm_model_config,
        ),
        Replacement(
            "ludwig.schema.export_schema",
            "export_schema",
            ("model_type", "strip_metadata"),
            "`ludwig export_schema` must give editors the strict schema of language models",
            _export_schema,
        ),
        Replacement(
            "ludwig.schema.export_schema",
            "export_combined_schema",
            ("strip_metadata",),
            "the same for the schema of all model types",
            _export_combined_schema,
        ),
        Replacement(
            "ludwig.modules.optimization_modules",
            "get_optimizer_class_and_kwargs",
            ("optimizer_config", "learning_rate"),
            "it passes options to the 8-bit optimisers that bitsandbytes no longer has",
            _get_optimizer_class_and_kwargs,
        ),
        Replacement(
            "ludwig.utils.llm_utils",
            "update_embedding_layer",
            ("model", "config_obj"),
            "for 8-bit optimisers it puts a new, trained embedding in the place of the frozen one",
            _update_embedding_layer,
        ),
        Replacement(
            "ludwig.api",
            "LudwigModel.evaluate",
            ("self", "skip_save_eval_stats", "output_directory"),
            "examples of the generated answers are written beside the statistics",
            _evaluate,
        ),
        Replacement(
            "ludwig.api",
            "LudwigModel.generate",
            ("self", "input_strings", "generation_config", "streaming"),
            "it refuses to run without CUDA and looks the tokenizer up by the base model's name",
            _generate,
        ),
        Replacement(
            "ludwig.features.base_feature",
            "InputFeature.initialize_encoder",
            ("self", "encoder_config"),
            "an encoder's adapter that cannot be applied is a warning, and all of the encoder trains",
            _initialize_encoder,
        ),
        Replacement(
            "ludwig.encoders.text_encoders",
            "HFTextEncoder.get_embedding_layer",
            ("self",),
            "under an adapter it takes the whole transformer for its embeddings, and explanations fail",
            _get_embedding_layer,
        ),
        Replacement(
            "ludwig.modules.optimization_modules",
            "_get_loraplus_lr_ratio",
            ("model",),
            "it does not look for the option in the encoders",
            _get_loraplus_lr_ratio,
        ),
        *(_of_ray() if _has_ray() else ()),
    ]


def _has_ray() -> bool:
    """Whether Ludwig's executor on Ray can be imported; without Ray, or with a part of it, its module fails."""
    if find_spec("ray") is None:
        return False
    try:
        importlib.import_module("ludwig.hyperopt.execution")
    except (ImportError, NameError):
        return False
    return True


def _of_ray() -> Iterator[Replacement]:
    yield Replacement(
        "ludwig.hyperopt.execution",
        "_create_tune_checkpoint",
        ("save_path",),
        "a trial that is stopped is evaluated with the weights of its last evaluation but one, or not at all",
        _create_tune_checkpoint,
    )


def _load_yaml(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.yaml_paths import load_yaml

    @functools.wraps(original)
    def replacement(config: Any) -> Any:
        return load_yaml(config)

    return replacement


def _upgrade_config(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.hyperopt import keep_executor
    from ludwig_peft_plugin.config.shape import check_shape
    from ludwig_peft_plugin.encoders.config import normalized

    @functools.wraps(original)
    def replacement(config: Any) -> Any:
        return keep_executor(original, normalized(check_shape(config)))

    return replacement


def _check_schema(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _substitute_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _get_dataset_configs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement() -> Any:
        from ludwig_peft_plugin.data.python_codes_25k import added_to

        return added_to(original())

    return replacement


def _preprocess_for_training(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.preprocess import preprocess_for_training

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return preprocess_for_training(*args, original=original, **kwargs)

    return replacement


def _preprocess_for_prediction(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.preprocess import preprocess_for_prediction

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return preprocess_for_prediction(*args, original=original, **kwargs)

    return replacement


def _update_config_with_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.metadata import update_config_with_metadata

    @functools.wraps(original)
    def replacement(config_obj: Any, training_set_metadata: dict[str, Any]) -> None:
        update_config_with_metadata(original, config_obj, training_set_metadata)

    return replacement


def _get_experiment_description(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.data.sources import describe_experiment

    @functools.wraps(original)
    def replacement(config: dict[str, Any], **arguments: Any) -> Any:
        return describe_experiment(original, config, **arguments)

    return replacement


def _get_llm_model_config(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.base_model import adapter_check_model_config

    @functools.wraps(original)
    def replacement(model_name: str) -> Any:
        return adapter_check_model_config(model_name)

    return replacement


def _export_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.editor_schema import export_schema

    return functools.wraps(original)(export_schema(original))


def _export_combined_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.config.editor_schema import export_combined_schema

    return functools.wraps(original)(export_combined_schema(original))


def _update_embedding_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.model.llm import PeftLLM

    @functools.wraps(original)
    def replacement(model: Any, config_obj: Any) -> Any:
        if isinstance(model, PeftLLM) and not model.trains_its_embedding:
            return model
        return original(model, config_obj)

    return replacement


def _get_optimizer_class_and_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.training.optimizers import supported_arguments

    @functools.wraps(original)
    def replacement(optimizer_config: Any, learning_rate: float) -> Any:
        optimizer, arguments = original(optimizer_config, learning_rate)
        return optimizer, supported_arguments(optimizer, arguments, optimizer_config)

    return replacement


def _evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.evaluation.ludwig_evaluate import evaluate_and_write
    from ludwig_peft_plugin.model.llm import PeftLLM

    @functools.wraps(original)
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.model, PeftLLM):
            return original(self, *args, **kwargs)
        return evaluate_and_write(original, self, *args, **kwargs)

    return replacement


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _initialize_encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.build import initialize_encoder

    @functools.wraps(original)
    def replacement(self: Any, encoder_config: Any) -> Any:
        return initialize_encoder(original, self, encoder_config)

    return replacement


def _get_embedding_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.build import embedding_layer

    @functools.wraps(original)
    def replacement(self: Any) -> Any:
        return embedding_layer(self)

    return replacement


def _create_tune_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.training.search_checkpoint import load_best_first

    @functools.wraps(original)
    def replacement(save_path: str) -> Any:
        checkpoint = original(save_path)
        load_best_first(checkpoint.path)
        return checkpoint

    return replacement


def _get_loraplus_lr_ratio(original: Callable[..., Any]) -> Callable[..., Any]:
    from ludwig_peft_plugin.encoders.optimizer import loraplus_ratio

    @functools.wraps(original)
    def replacement(model: Any) -> float | None:
        ratio: float | None = original(model)
        return loraplus_ratio(model) if ratio is None else ratio

    return replacement
