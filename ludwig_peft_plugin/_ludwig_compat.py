"""Every function of Ludwig's that the plugin replaces because no registry reaches it, each with its reason.

An entry also names the parameters its replacement relies on: when Ludwig changes one, registering raises
`LudwigChangedError` and replaces nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec

from ludwig_peft_plugin import _ludwig_stand_ins as stand_ins
from ludwig_peft_plugin._replace import Replacement


def replacements() -> list[Replacement]:
    """Return what is replaced in Ludwig beside its registries, each with its reason."""
    return [
        Replacement(
            "ludwig.utils.data_utils",
            "load_yaml",
            ("yaml_fp",),
            "relative dataset paths of a YAML file are meant from the file's folder, which is lost after reading",
            stand_ins.load_yaml,
        ),
        Replacement(
            "ludwig.utils.data_utils",
            "load_config_from_str",
            ("config",),
            "the same for a config given as text, whose paths are meant from the working directory",
            stand_ins.load_yaml,
        ),
        Replacement(
            "ludwig.utils.backward_compatibility",
            "upgrade_config_dict_to_latest_version",
            ("config",),
            "a config of the wrong shape, such as one without features, fails in it with a KeyError",
            stand_ins.upgrade_config,
        ),
        Replacement(
            "ludwig.config_validation.validation",
            "check_schema",
            ("updated_config",),
            "unknown keys pass and wrong values print whole schemas",
            stand_ins.check_schema,
        ),
        Replacement(
            "ludwig.hyperopt.utils",
            "substitute_parameters",
            ("config", "parameters"),
            "options of another adapter type stay in a trial's config, and the Optuna executor drops what it returns",
            stand_ins.substitute_parameters,
        ),
        Replacement(
            "ludwig.datasets",
            "_get_dataset_configs",
            (),
            "a dataset of ours is added to the list when it is first read: reading its 590 files takes seconds",
            stand_ins.get_dataset_configs,
        ),
        Replacement(
            "ludwig.data.preprocessing",
            "preprocess_for_training",
            ("config", "dataset", "training_set", "validation_set", "test_set", "data_format", "backend"),
            "tokens must not be padded, cut and filled, and the YAML names the dataset",
            stand_ins.preprocess_for_training,
        ),
        Replacement(
            "ludwig.data.preprocessing",
            "preprocess_for_prediction",
            ("config", "dataset", "training_set_metadata", "data_format", "split", "include_outputs", "backend"),
            "the same for prediction, which fails for tokenizers without an unknown token",
            stand_ins.preprocess_for_prediction,
        ),
        Replacement(
            "ludwig.features.feature_registries",
            "update_config_with_metadata",
            ("config_obj", "training_set_metadata"),
            "it copies the whole vocabulary into the config and the metadata, several times",
            stand_ins.update_config_with_metadata,
        ),
        Replacement(
            "ludwig.experiment_utils",
            "get_experiment_description",
            ("config", "dataset", "training_set", "validation_set", "test_set", "data_format"),
            "it fails where no dataset is given as an argument, though the YAML names one",
            stand_ins.get_experiment_description,
        ),
        Replacement(
            "ludwig.config_validation.checks",
            "_get_llm_model_config",
            ("model_name",),
            "it asks transformers for the base model's name, which does not know the shipped model",
            stand_ins.get_llm_model_config,
        ),
        Replacement(
            "ludwig.schema.export_schema",
            "export_schema",
            ("model_type", "strip_metadata"),
            "`ludwig export_schema` must give editors the strict schema of language models",
            stand_ins.export_schema,
        ),
        Replacement(
            "ludwig.schema.export_schema",
            "export_combined_schema",
            ("strip_metadata",),
            "the same for the schema of all model types",
            stand_ins.export_combined_schema,
        ),
        Replacement(
            "ludwig.modules.optimization_modules",
            "get_optimizer_class_and_kwargs",
            ("optimizer_config", "learning_rate"),
            "it passes options to the 8-bit optimisers that bitsandbytes no longer has",
            stand_ins.get_optimizer_class_and_kwargs,
        ),
        Replacement(
            "ludwig.utils.llm_utils",
            "update_embedding_layer",
            ("model", "config_obj"),
            "for 8-bit optimisers it puts a new, trained embedding in the place of the frozen one",
            stand_ins.update_embedding_layer,
        ),
        Replacement(
            "ludwig.api",
            "LudwigModel.__init__",
            ("self", "config", "backend"),
            "a backend that is given as an argument is not in the config, which the checks of adapters read",
            stand_ins.init_model,
        ),
        Replacement(
            "ludwig.api",
            "LudwigModel.evaluate",
            ("self", "skip_save_eval_stats", "output_directory"),
            "examples of the generated answers are written beside the statistics",
            stand_ins.evaluate,
        ),
        Replacement(
            "ludwig.api",
            "LudwigModel.generate",
            ("self", "input_strings", "generation_config", "streaming"),
            "it refuses to run without CUDA and looks the tokenizer up by the base model's name",
            stand_ins.generate,
        ),
        Replacement(
            "ludwig.features.base_feature",
            "InputFeature.initialize_encoder",
            ("self", "encoder_config"),
            "an encoder's adapter that cannot be applied is a warning, and all of the encoder trains",
            stand_ins.initialize_encoder,
        ),
        Replacement(
            "ludwig.encoders.text_encoders",
            "HFTextEncoder.get_embedding_layer",
            ("self",),
            "under an adapter it takes the whole transformer for its embeddings, and explanations fail",
            stand_ins.get_embedding_layer,
        ),
        Replacement(
            "ludwig.modules.optimization_modules",
            "_get_loraplus_lr_ratio",
            ("model",),
            "it does not look for the option in the encoders",
            stand_ins.get_loraplus_lr_ratio,
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
        stand_ins.create_tune_checkpoint,
    )
