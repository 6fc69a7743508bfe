"""Unknown keys and wrong values anywhere in an LLM config are found, and told in a line each."""

from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.utils import LudwigBaseConfig

FINETUNE = {"type": "finetune"}

# (changed sections, path of the unknown key, what is suggested)
TYPOS: list[tuple[dict[str, Any], str, str]] = [
    ({"adaptor": {"type": "lora"}, "adapter": ...}, "adaptor", "did you mean `adapter`?"),
    ({"trainer": {**FINETUNE, "learning_ratee": 1}}, "trainer.learning_ratee", "did you mean `learning_rate`?"),
    (
        {"trainer": {**FINETUNE, "optimizer": {"type": "adamw", "weight_deca": 1}}},
        "trainer.optimizer.weight_deca",
        "did you mean `weight_decay`?",
    ),
    (
        {"trainer": {**FINETUNE, "learning_rate_scheduler": {"decai": "cosine"}}},
        "trainer.learning_rate_scheduler.decai",
        "did you mean `decay`?",
    ),
    (
        {"trainer": {**FINETUNE, "gradient_clipping": {"clipglobalnrm": 1}}},
        "trainer.gradient_clipping.clipglobalnrm",
        "did you mean `clipglobalnorm`?",
    ),
    ({"trainer": {**FINETUNE, "profiler": {"wayt": 1}}}, "trainer.profiler.wayt", "did you mean `wait`?"),
    ({"adapter": {"type": "lora", "rr": 4}}, "adapter.rr", "did you mean `r`?"),
    ({"adapter": {"type": "lora", "rank": 4}}, "adapter.rank", "did you mean `r`?"),
    ({"adapter": {"type": "dora", "lora_alpha": 4}}, "adapter.lora_alpha", "did you mean `alpha`?"),
    (
        {"adapter": {"type": "lora", "init_lora_weights": "eva", "eva_config": {"roh": 2}}},
        "adapter.eva_config.roh",
        "did you mean `rho`?",
    ),
    (
        {"adapter": {"type": "lora", "postprocessor": {"merge_adapter_into_base": True}}},
        "adapter.postprocessor.merge_adapter_into_base",
        "did you mean `merge_adapter_into_base_model`?",
    ),
    (
        {"adapter": ..., "adapters": {"adapters": {"a": {"type": "lora", "drop_out": 0}}}},
        "adapters.adapters.a.drop_out",
        "did you mean `dropout`?",
    ),
    (
        {
            "adapter": ...,
            "adapters": {"adapters": {"a": {"type": "lora"}}, "merge": {"sorces": ["a"], "sources": ["a"]}},
        },
        "adapters.merge.sorces",
        "did you mean `sources`?",
    ),
    ({"quantization": {"bit": 4}}, "quantization.bit", "did you mean `bits`?"),
    ({"quantization": {"quantization_type": "nf4"}}, "quantization.quantization_type", "`bnb_4bit_quant_type`"),
    ({"generation": {"temprature": 1.0}}, "generation.temprature", "did you mean `temperature`?"),
    ({"prompt": {"templete": "{x}"}}, "prompt.templete", "did you mean `template`?"),
    (
        {"prompt": {"template": "{x}{__context__}", "retrieval": {"typ": "random"}}},
        "prompt.retrieval.typ",
        "did you mean `type`?",
    ),
    ({"preprocessing": {"sampel_ratio": 1.0}}, "preprocessing.sampel_ratio", "did you mean `sample_ratio`?"),
    (
        {"preprocessing": {"split": {"type": "fixed", "colum": "s"}}},
        "preprocessing.split.colum",
        "did you mean `column`?",
    ),
    (
        {"input_features": [{"name": "a", "type": "text", "preprocessing": {"max_sequence_lenght": 3}}]},
        "input_features[0].preprocessing.max_sequence_lenght",
        "did you mean `max_sequence_length`?",
    ),
    (
        {"output_features": [{"name": "a", "type": "text", "loss": {"wait": 1}}]},
        "output_features[0].loss.wait",
        "did you mean `weight`?",
    ),
    (
        {"output_features": [{"name": "a", "type": "text", "decoder": {"type": "text_extractor", "tokeniser": 1}}]},
        "output_features[0].tokeniser",
        "did you mean `tokenizer`?",
    ),
    (
        {"defaults": {"text": {"preprocessing": {"lowercas": True}}}},
        "defaults.text.preprocessing.lowercas",
        "did you mean `lowercase`?",
    ),
    ({"model_parameters": {"rope_scalin": {}}}, "model_parameters.rope_scalin", "did you mean `rope_scaling`?"),
    ({"export": [{"format": "merged", "dtyp": "float32"}]}, "export[0].dtyp", "did you mean `dtype`?"),
    ({"hyperopt": {"gaol": "minimize"}}, "hyperopt.gaol", "did you mean `goal`?"),
    (
        {"hyperopt": {"executor": {"num_sample": 3}}},
        "hyperopt.executor.num_sample",
        "did you mean `num_samples`?",
    ),
    (
        {"hyperopt": {"parameters": {"adapter.r": {"space": "choice", "categorys": [1]}}}},
        "hyperopt.parameters.adapter.r.categorys",
        "did you mean `categories`?",
    ),
]

# (changed sections, path of the wrong value, what is allowed)
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"adapter": {"type": "lora", "r": 0}}, "adapter.r", "0 is not allowed; give a whole number >= 1"),
    ({"adapter": {"type": "qlora", "r": 0}}, "adapter.r", "0 is not allowed; give a whole number >= 1"),
    ({"adapter": {"type": "lora", "r": "abc"}}, "adapter.r", '"abc" is not allowed; give a whole number >= 1'),
    ({"adapter": {"type": "lora", "r": "8"}}, "adapter.r", "this is text: write it without quotes"),
    ({"adapter": {"type": "lora", "r": True}}, "adapter.r", "true is not allowed"),
    ({"adapter": {"type": "lora", "target_modules": 5}}, "adapter.target_modules", "a list of module names"),
    ({"adapter": {"type": "lora", "use_rslora": "yes"}}, "adapter.use_rslora", "give true or false"),
    ({"adapter": {"type": "lora", "bias_type": "some"}}, "adapter.bias_type", "one of `none`, `all`, `lora_only`"),
    ({"adapter": {"type": "lorra"}}, "adapter.type", "did you mean `lora`?"),
    ({"adapter": "lorra"}, "adapter.type", "did you mean `lora`?"),
    ({"adapter": ["lora"]}, "adapter", "give a mapping with a `type`"),
    ({"adapter": {"type": "ia3", "target_modules": 5}}, "adapter.target_modules", "a list of module names"),
    ({"trainer": {**FINETUNE, "epochs": -1}}, "trainer.epochs", "-1 is not allowed; give a whole number >= 1"),
    ({"trainer": {**FINETUNE, "epochs": 1.5}}, "trainer.epochs", "give a whole number >= 1"),
    ({"trainer": {**FINETUNE, "learning_rate": "fast"}}, "trainer.learning_rate", "a number >= 0 and <= 1, or `auto`"),
    ({"trainer": {**FINETUNE, "batch_size": 0}}, "trainer.batch_size", "a whole number >= 1, or `auto`"),
    ({"trainer": {**FINETUNE, "batch_size": None}}, "trainer.batch_size", "null is not allowed"),
    ({"trainer": {**FINETUNE, "early_stop": -2}}, "trainer.early_stop", ">= -1"),
    ({"trainer": {**FINETUNE, "optimizer": "adamw"}}, "trainer.optimizer", "write {type: adamw}"),
    ({"trainer": {**FINETUNE, "optimizer": {"type": "adamv"}}}, "trainer.optimizer.type", "did you mean `adam"),
    ({"trainer": {**FINETUNE, "optimizer": None}}, "trainer.optimizer", "leave the line out for the default"),
    (
        {"trainer": {**FINETUNE, "optimizer": {"type": "adamw", "betas": [0.9, 2]}}},
        "trainer.optimizer.betas",
        "a list of 2 numbers, each >= 0 and <= 1",
    ),
    (
        {"trainer": {**FINETUNE, "learning_rate_scheduler": {"decay": "cosin"}}},
        "trainer.learning_rate_scheduler.decay",
        "`cosine`",
    ),
    ({"trainer": {"type": "finetun"}}, "trainer.type", "did you mean `finetune`?"),
    ({"quantization": {"bits": 3}}, "quantization.bits", "give one of `4`, `8`"),
    ({"quantization": 4}, "quantization", "give a mapping of options"),
    ({"precision": "fp16"}, "precision", "`float16`"),
    ({"data_format": "cvs"}, "data_format", "`csv`"),
    ({"dataset": 3}, "dataset", "give text, or null"),
    ({"base_model": ["a"]}, "base_model", "a folder or a model's name"),
    ({"base_model": ...}, "base_model", "is missing"),
    ({"preprocessing": {"overlong": "cut"}}, "preprocessing.overlong", "`truncate`, `drop`, `keep`, `error`"),
    ({"preprocessing": {"split": {"type": "fix"}}}, "preprocessing.split.type", "did you mean `fixed`?"),
    ({"preprocessing": {"sample_ratio": -1}}, "preprocessing.sample_ratio", "a number >= 0"),
    ({"generation": {"top_p": 2}}, "generation.top_p", "a number >= 0 and <= 1, or null"),
    ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens", "a whole number >= 1"),
    ({"export": "merged"}, "export", "give a list"),
    ({"export": [{"path": "x"}]}, "export[0].format", "is missing; give one of `adapter`, `adapterhub`, `merged`"),
    ({"export": ["gguf"]}, "export[0].format", "give one of `adapter`, `adapterhub`, `merged`"),
    ({"hyperopt": {"goal": "minimise"}}, "hyperopt.goal", "`minimize`"),
    ({"input_features": [{"name": "a", "type": "txt"}]}, "input_features[0].type", "did you mean `text`?"),
    ({"output_features": []}, "output_features", "holds 0 entries; give 1"),
]


def ids(cases: list[tuple[dict[str, Any], str, str]]) -> list[str]:
    return [f"{path}-{index}" for index, (_, path, _) in enumerate(cases)]


@pytest.mark.parametrize(("sections", "path", "suggestion"), TYPOS, ids=ids(TYPOS))
def test_unknown_key_is_an_error_with_a_suggestion(errors: Any, sections: Any, path: str, suggestion: str) -> None:
    found = errors(**sections)
    assert suggestion in found[path]
    assert len(found) == 1 or path == "adaptor"


@pytest.mark.parametrize(("sections", "path", "allowed"), WRONG, ids=ids(WRONG))
def test_wrong_value_says_what_is_allowed(errors: Any, sections: Any, path: str, allowed: str) -> None:
    found = errors(**sections)
    assert list(found) == [path]
    assert allowed in found[path]
    assert len(found[path]) < 300


def test_valid_config_has_no_problems(errors: Any) -> None:
    assert errors() == {}


def test_all_problems_are_in_one_short_error(load: Any) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        load(adapter={"type": "lora", "rr": 4}, trainer={**FINETUNE, "epochs": -1}, foo=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The config has 3 errors:"
    assert lines[1] == "- adapter.rr: unknown option; did you mean `r`?"
    assert lines[2] == "- trainer.epochs: -1 is not allowed; give a whole number >= 1"
    assert lines[3].startswith("- foo: unknown option; known here: `adapter`, `adapters`, ")
    assert max(map(len, lines)) < 250
    assert len(lines) == 4


def test_long_lists_of_problems_are_cut(load: Any) -> None:
    with pytest.raises(ConfigValidationError, match=r"has 40 errors[\s\S]*and 25 more") as caught:
        load(**{f"unknown_{index}": 1 for index in range(40)})
    assert len(str(caught.value).splitlines()) == 17


def test_option_at_the_wrong_level_is_sent_home(errors: Any) -> None:
    assert (
        errors(learning_rate=0.1)["learning_rate"] == "does not stand at the top; write it as `trainer.learning_rate`"
    )
    assert "`adapter.r`" in errors(r=8)["r"]


def test_option_of_another_type_is_named(errors: Any) -> None:
    assert errors(adapter={"type": "qlora", "use_dora": True})["adapter.use_dora"].startswith(
        "is an option of type `lora`"
    )
    assert "model_type: ecd" in errors(combiner={"type": "concat"})["combiner"]


@pytest.mark.filterwarnings("ignore:encoder specific parameters:DeprecationWarning")
def test_unknown_feature_key_is_reported_where_it_was_written(load: Any) -> None:
    # Ludwig's upgrade moves it into the encoder before anything is checked.
    with pytest.raises(
        ConfigValidationError, match=r"input_features\[0\]\.colunm: unknown option; did you mean `column`"
    ):
        load(input_features=[{"name": "prompt", "type": "text", "colunm": "x"}])


def test_values_that_are_easily_refused_by_mistake_pass(errors: Any) -> None:
    assert errors(trainer={**FINETUNE, "learning_rate": "2e-4", "epochs": 3.0, "eval_batch_size": None}) == {}
    assert errors(adapter="LoRA") == {}
    assert errors(adapter={"type": "lora", "target_modules": "all-linear"}) == {}
    assert errors(trainer={**FINETUNE, "learning_rate": "auto", "batch_size": "auto"}) == {}
    assert errors(generation=None, preprocessing=None, quantization=None, export=None) == {}
    assert errors(backend="local") == {}
    assert errors(backend={"type": "ray", "trainer": {"strategy": "ddp"}}) == {}
    assert errors(ludwig_version="0.16.1") == {}


def test_every_default_of_every_section_fits_itself() -> None:
    from ludwig_peft_plugin.config import values
    from ludwig_peft_plugin.config.llm_config import LLMConfig
    from ludwig_peft_plugin.config.sections import Checked, Choice, ListOf, MapOf, Scalar, Section, options

    seen: set[type[LudwigBaseConfig]] = set()
    refused = []

    def visit(cls: type[LudwigBaseConfig]) -> None:
        if cls in seen:
            return
        seen.add(cls)
        for option in options(cls).values():
            shape = option.shape.item if isinstance(option.shape, ListOf | MapOf) else option.shape
            if isinstance(shape, Section):
                visit(shape.cls)
            elif isinstance(shape, Choice):
                for each in shape.types().values():
                    visit(each)
            elif (
                isinstance(shape, Scalar | Checked) and not option.required and not values.fits(option.default, option)
            ):
                refused.append((cls.__name__, option.name))

    visit(LLMConfig)
    assert refused == [("LLMConfig", "base_model")]  # required, though its class gives it the default None
    assert len(seen) > 100
