"""The config class that `model_type: llm` resolves to: Ludwig's, with the sections this plugin adds or changes."""

from __future__ import annotations

import logging
from typing import Any

from ludwig.constants import TEXT
from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from ludwig.schema.llms.prompt import PromptConfig
from ludwig.schema.model_types.llm import LLMModelConfig
from pydantic import ValidationError, model_validator

from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.config.adapters_section import AdaptersConfig
from ludwig_peft_plugin.config.base_model import BaseModelField, load_base_model_config
from ludwig_peft_plugin.config.data_formats import DATA_FORMATS
from ludwig_peft_plugin.config.evaluation import EvaluationConfig
from ludwig_peft_plugin.config.export import ExportField, check_exports
from ludwig_peft_plugin.config.fields import SectionField, SelectionField
from ludwig_peft_plugin.config.generation import GenerationConfig
from ludwig_peft_plugin.config.hyperopt import HyperoptSection
from ludwig_peft_plugin.config.normalize import normalized
from ludwig_peft_plugin.config.preprocessing import PreprocessingConfig
from ludwig_peft_plugin.config.quantization import QuantizationField
from ludwig_peft_plugin.config.readable import reason

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def _stock_selection(name: str) -> schema_utils.TypeSelection:
    marker = LLMModelConfig.model_fields[name].metadata[0]
    return marker.type_selection


def _source(description: str) -> Any:
    return schema_utils.String(default=None, allow_none=True, description=description)


class LLMConfig(LLMModelConfig):
    """Everything a language model's YAML file can say."""

    model_type: str = schema_utils.ProtectedString("llm", description="A language model.")

    base_model: str = BaseModelField().get_default_field()

    dataset: str | None = _source(
        "The data: a file, `hf://<name>` on the Hugging Face hub, or `ludwig://<name>` of Ludwig's datasets. A "
        "relative path starts at the YAML file's folder. `--dataset` or `train(dataset=...)` wins over it."
    )
    training_set: str | None = _source("The training rows, where the data is already split; instead of `dataset`.")
    validation_set: str | None = _source("The validation rows that go with `training_set`.")
    test_set: str | None = _source("The test rows that go with `training_set`.")
    data_format: str | None = schema_utils.StringOptions(
        options=list(DATA_FORMATS),
        default=None,
        allow_none=True,
        description="The format of the data files; by default told from their names.",
    )

    precision: str = schema_utils.StringOptions(
        options=list(PRECISIONS),
        default="auto",
        description=(
            "The number format of the base's weights and of the computation; `auto` is bfloat16 on a GPU that computes "
            "in it and float32 elsewhere."
        ),
    )

    preprocessing: PreprocessingConfig = SectionField("preprocessing", PreprocessingConfig).get_default_field()

    prompt: PromptConfig = SectionField(
        "prompt", PromptConfig, "The text a row is asked with, made of its columns."
    ).get_default_field()

    generation: GenerationConfig = SectionField("generation", GenerationConfig).get_default_field()

    evaluation: EvaluationConfig = SectionField("evaluation", EvaluationConfig).get_default_field()

    trainer: Any = SelectionField(
        "trainer", _stock_selection("trainer"), "How the model is trained, or that it is not."
    ).get_default_field()

    adapter: Any = AdapterSelection().get_default_field()

    adapters: Any = SectionField(
        "adapters", AdaptersConfig, "Several adapters by name, instead of `adapter`.", off_by_default=True
    ).get_default_field()

    quantization: Any = QuantizationField().get_default_field()

    hyperopt: Any = SectionField(
        "hyperopt", HyperoptSection, "A search for the best options (`ludwig hyperopt`).", off_by_default=True
    ).get_default_field()

    export: list[Any] = ExportField().get_default_field()

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> LLMConfig:
        """Build the config object from a dict; every failure is a ConfigValidationError of a few lines."""
        try:
            return super().model_validate(obj, **kwargs)
        except (ValidationError, ConfigValidationError) as error:
            raise ConfigValidationError(reason(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _pre_validate(cls, data: Any) -> Any:
        return super()._pre_validate(normalized(data, cls) if isinstance(data, dict) else data)

    def __post_init__(self) -> None:
        model_config = load_base_model_config(self)
        generation = self.generation
        answer_length = self._answer_length(model_config)
        # Ludwig replaces the default length by its own rule, which loads the base model by a name it may not know;
        # any other value passes it by.
        default = GenerationConfig().max_new_tokens
        generation.max_new_tokens = answer_length if answer_length != default else default + 1
        named = self.adapters
        active = None if named is None else named.active
        if isinstance(active, list):
            named.active = active[0]  # Ludwig's check knows a name, not a list
        super().__post_init__()
        if isinstance(active, list):
            named.active = active
        generation.max_new_tokens = answer_length
        for feature in self.output_features:
            if feature.type == TEXT:
                feature.decoder.max_new_tokens = answer_length
        check_exports(self)

    def _answer_length(self, model_config: Any) -> int:
        """Return how many tokens are generated at most: what the config says, else Ludwig's rule.

        That is the longest answer or row the config allows, else half the model's context. Where the first leaves no
        token of the context for the prompt, half the context is taken too.
        """
        from ludwig_peft_plugin.model.base_model import context_length

        given: int | None = self.generation.max_new_tokens
        default: int = GenerationConfig().max_new_tokens
        output = self.output_features[0]
        if given is not None and ("max_new_tokens" in self.generation.model_fields_set or output.type != TEXT):
            return given
        half = max(1, context_length(model_config) // 2)
        longest = output.preprocessing.max_sequence_length if output.type == TEXT else None
        longest = longest or self.preprocessing.global_max_sequence_length
        length = half if longest is None else max(default, longest)
        if length >= 2 * half:
            length = half
        logger.info("generation.max_new_tokens is not given: %d tokens are generated at most.", length)
        return length
