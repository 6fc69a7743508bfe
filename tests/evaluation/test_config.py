"""The `evaluation` section and the metrics' names in the rest of the config."""

from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.base import ModelConfig

from ludwig_peft_plugin.evaluation.text_metrics import TEXT_METRICS

FINETUNE = {"type": "finetune"}
DEFAULT = ["exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]


@pytest.fixture
def load(registered: None) -> Any:
    """Return a function that makes the config object of a small config with other sections."""

    def make(**sections: Any) -> Any:
        config = {
            "model_type": "llm",
            "base_model": "tiny-llama-python",
            "prompt": {"template": "Task: {instruction}\n"},
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "adapter": {"type": "lora"},
            "trainer": FINETUNE,
        }
        return ModelConfig.from_dict({**config, **sections})

    return make


def test_defaults(load):
    section = load().evaluation
    assert (section.metrics, section.language, section.during_training) == (DEFAULT, None, False)
    assert (section.rows, section.examples) == (None, 20)
    assert section.reported == DEFAULT


def test_what_is_given(load):
    section = load(
        evaluation={"metrics": ["chrf"], "language": "python", "during_training": True, "rows": 5, "examples": 0}
    ).evaluation
    assert section.reported == ["chrf", "parses"]
    assert (section.during_training, section.rows, section.examples) == (True, 5, 0)
    assert load(evaluation={"metrics": []}).evaluation.reported == []


def test_survives_saving(load):
    config = load(evaluation={"metrics": ["rougeL", "bleu"], "language": "json"})
    assert ModelConfig.from_dict(config.to_dict()).evaluation.to_dict() == config.evaluation.to_dict()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"metric": ["bleu"]}, r"evaluation\.metric: .*metrics"),
        ({"metrics": ["blue"]}, r"evaluation\.metrics"),
        ({"metrics": "bleu"}, r"evaluation\.metrics"),
        ({"metrics": ["parses"]}, r"evaluation\.metrics"),
        ({"language": "pyton"}, r"evaluation\.language"),
        ({"rows": 0, "during_training": True}, r"evaluation\.rows"),
        ({"examples": -1}, r"evaluation\.examples"),
        ({"rows": 10}, r"evaluation\.rows: is only read while training; give during_training: true"),
    ],
)
def test_mistakes_are_told(load, section, message):
    with pytest.raises(ConfigValidationError, match=message) as caught:
        load(evaluation=section)
    assert len(str(caught.value).splitlines()) < 6


def test_generating_while_not_training_is_refused(load):
    with pytest.raises(ConfigValidationError, match=r"evaluation\.during_training: trainer\.type `none`"):
        load(evaluation={"during_training": True}, trainer={"type": "none"}, adapter=None)


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_ludwig_knows_each_metrics_direction(load, name):
    from ludwig.modules.metric_modules import get_best_function, get_improved_fn, get_initial_validation_value

    load()
    assert get_improved_fn(name)(0.5, 0.25)
    assert get_best_function(name) is max
    assert get_initial_validation_value(name) < 0


def test_a_text_metric_can_decide(load):
    trainer = {
        **FINETUNE,
        "validation_metric": "bleu",
        "learning_rate_scheduler": {
            "reduce_on_plateau": 1,
            "reduce_eval_metric": "parses",
            "reduce_eval_split": "validation",
        },
    }
    config = load(trainer=trainer, evaluation={"during_training": True, "language": "python"})
    assert config.trainer.validation_metric == "bleu"
    assert config.trainer.validation_field == "output"


@pytest.mark.parametrize(
    ("trainer", "evaluation", "message"),
    [
        ({"validation_metric": "bleu"}, {}, r"validation_metric: `bleu` is made of generated answers.*during_training"),
        (
            {"validation_metric": "bleu"},
            {"metrics": ["chrf"], "during_training": True},
            r"validation_metric: `bleu` is not computed; give `bleu` in evaluation\.metrics",
        ),
        ({"validation_metric": "parses"}, {"during_training": True}, r"give evaluation\.language too"),
        (
            {"learning_rate_scheduler": {"reduce_on_plateau": 1, "reduce_eval_metric": "chrf"}},
            {"during_training": True},
            r"reduce_eval_metric: `chrf` is not computed on the training set",
        ),
    ],
)
def test_a_text_metric_that_would_not_be_there_cannot_decide(load, trainer, evaluation, message):
    with pytest.raises(ConfigValidationError, match=message):
        load(trainer={**FINETUNE, **trainer}, evaluation=evaluation)


def test_other_model_types_have_no_generated_answers(load):
    load()
    config = {
        "input_features": [{"name": "a", "type": "number"}],
        "output_features": [{"name": "b", "type": "text"}],
        "trainer": {"validation_metric": "bleu"},
    }
    with pytest.raises(ConfigValidationError, match="generated answers, which model_type `ecd` has not"):
        ModelConfig.from_dict(config)


def test_text_features_of_other_model_types_compute_none(load):
    from ludwig.modules.metric_registry import get_metric_classes

    load()
    classes = get_metric_classes("text")
    assert set(TEXT_METRICS) <= set(classes)
    assert not any(classes[name].can_report(None) for name in TEXT_METRICS)


def test_answers_that_are_no_text_have_no_section(load):
    match = {"positive": {"type": "contains", "value": "good"}, "negative": {"type": "contains", "value": "bad"}}
    output = {
        "name": "label",
        "type": "category",
        "preprocessing": {"fallback_label": "negative"},
        "decoder": {"type": "category_extractor", "match": match},
    }
    sections = {
        "output_features": [output],
        "adapter": None,
        "trainer": {"type": "none"},
        "prompt": {"task": "Say what it is."},
    }
    load(**sections)
    with pytest.raises(ConfigValidationError, match="evaluation: is for text answers"):
        load(**sections, evaluation={"metrics": ["bleu"]})
