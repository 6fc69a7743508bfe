"""The config object: what it adds to Ludwig's, how it fills what is left open, and that it survives being saved."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.base import ModelConfig

FINETUNE = {"type": "finetune"}
CONTEXT = 1024  # of the shipped model


def test_llm_configs_are_ours(load: Any) -> None:
    from ludwig_peft_plugin.config.llm_config import LLMConfig

    assert type(load()) is LLMConfig


def test_added_sections_and_their_defaults(load: Any) -> None:
    config = load()
    assert (config.dataset, config.training_set, config.validation_set, config.test_set) == (None, None, None, None)
    assert (config.data_format, config.precision, config.export) == (None, "auto", [])
    assert config.preprocessing.overlong == "truncate"


def test_added_sections_when_given(load: Any) -> None:
    config = load(
        dataset="data.csv",
        data_format="csv",
        precision="bfloat16",
        preprocessing={"overlong": "drop"},
        export=["adapter", {"format": "merged", "dtype": "float16", "tolerance": 0.1, "path": "out/full"}],
    )
    assert (config.dataset, config.data_format, config.precision) == ("data.csv", "csv", "bfloat16")
    assert config.preprocessing.overlong == "drop"
    assert [(entry.format, entry.dtype, entry.tolerance, entry.path) for entry in config.export] == [
        ("adapter", "auto", None, None),
        ("merged", "float16", 0.1, "out/full"),
    ]


@pytest.mark.parametrize("adapter", [None, "lora", "qlora", "dora", {"type": "ia3"}, {"type": "lora", "alpha": 3}])
def test_saved_config_loads_to_the_same_one(load: Any, adapter: Any) -> None:
    config = load(adapter=adapter, export=["merged"], trainer={**FINETUNE, "learning_rate": 1e-4})
    saved = json.loads(json.dumps(config.to_dict()))
    again = ModelConfig.from_dict(saved)
    assert again.to_dict() == config.to_dict()


def test_a_type_brings_its_learning_rate_where_none_is_given(load: Any) -> None:
    ludwigs = load(adapter="lora").trainer.learning_rate
    assert load(adapter="prefix").trainer.learning_rate == 5e-3 != ludwigs
    assert load(adapter="prefix", trainer={**FINETUNE, "learning_rate": 1e-4}).trainer.learning_rate == 1e-4
    assert load(adapter=None, trainer=FINETUNE).trainer.learning_rate == ludwigs


def test_several_adapters_bring_the_learning_rate_of_those_that_are_trained(
    load: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
    from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig

    def rate(trainer: Any = FINETUNE, **section: Any) -> Any:
        return load(adapter=..., adapters={"adapters": named, **section}, trainer=trainer).trainer.learning_rate

    caplog.set_level("INFO", logger="ludwig_peft_plugin")
    named: dict[str, Any] = {"adapter": "ia3", "other": {"type": "ia3"}}
    ludwigs, ia3 = (load(adapter=name).trainer.learning_rate for name in ("lora", "ia3"))
    assert rate() == rate(active=["adapter", "other"]) == ia3 != ludwigs
    assert rate(active="merged", merge={"sources": ["adapter", "other"]}) == ia3
    assert rate(trainer={**FINETUNE, "learning_rate": 1e-5}) == 1e-5

    monkeypatch.setattr(DoraConfig, "learning_rate", 2e-5)
    monkeypatch.setattr(QLoraConfig, "learning_rate", 0.5)
    named = {"adapter": "lora", "dora": {"type": "dora"}, "qlora": "qlora"}
    assert rate() == ludwigs
    assert rate(active="dora") == rate(active=["adapter", "dora"], trained=["dora"]) == 2e-5
    assert not any("trainer.learning_rate" in message for message in caplog.messages)
    assert rate(active=["adapter", "qlora"]) == ludwigs
    assert rate(active=["qlora", "dora"]) == 2e-5
    first, second = (message for message in caplog.messages if "trainer.learning_rate" in message)
    smallest = "trainer.learning_rate is not given: {:g}, the smallest of what the adapters use ({})."
    assert first == smallest.format(ludwigs, f"adapter {ludwigs:g}, qlora 0.5")
    assert second == smallest.format(2e-5, "dora 2e-05, qlora 0.5")


def test_config_objects_can_be_copied_and_sent(load: Any) -> None:
    config = load(adapter="qlora", export=["merged"])
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_the_given_dict_is_left_as_it_is(config: Any) -> None:
    given = config(adapter="qlora", trainer={**FINETUNE, "learning_rate": "2e-4"}, generation=None)
    before = copy.deepcopy(given)
    ModelConfig.from_dict(given)
    assert given == before


def test_adapter_by_name_and_in_any_case(load: Any) -> None:
    assert load(adapter="LoRA").adapter.type == "lora"
    assert load(adapter={"type": "DoRA", "r": 3}).adapter.r == 3


def test_adapter_by_another_name(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ludwig.schema.llms.peft import adapter_registry

    monkeypatch.setattr(adapter_registry["dora"], "aliases", ("weight-decomposed",))
    config = load(adapter={"type": "Weight-Decomposed", "r": 3})
    assert (config.adapter.type, config.adapter.r) == ("dora", 3)
    assert config.to_dict()["adapter"]["type"] == "dora"


def test_qlora_brings_its_quantization(load: Any) -> None:
    quantization = load(adapter="qlora").quantization
    assert (quantization.backend, quantization.bits) == ("bitsandbytes", 4)
    assert (quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == ("nf4", True)


def test_quantization_that_is_given_wins(load: Any) -> None:
    assert load(adapter="qlora", quantization={"bits": 8}).quantization.bits == 8
    assert load(adapter="lora").quantization is None


def test_named_adapter_brings_its_quantization(load: Any) -> None:
    config = load(adapter=..., adapters={"adapters": {"a": {"type": "qlora"}}})
    assert config.quantization.bits == 4


def test_two_configs_do_not_share_the_quantization(load: Any) -> None:
    first, second = load(adapter="qlora"), load(adapter="qlora")
    first.quantization.bits = 8
    assert second.quantization.bits == 4


def test_compute_dtype_follows_precision_unless_given(load: Any) -> None:
    assert load(quantization={"bits": 4}).quantization.bnb_4bit_compute_dtype == "auto"
    given = load(quantization={"bits": 4, "bnb_4bit_compute_dtype": "float16"}).quantization
    assert given.bnb_4bit_compute_dtype == "float16"


def test_quantization_for_transformers(load: Any) -> None:
    import torch

    settings = load(adapter="qlora").quantization.to_bitsandbytes()
    assert settings.load_in_4bit
    assert settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == torch.float32
    given = {"bits": 4, "bnb_4bit_compute_dtype": "float16"}
    assert load(quantization=given).quantization.to_bitsandbytes().bnb_4bit_compute_dtype == torch.float16
    assert load(quantization={"bits": 8}).quantization.to_bitsandbytes().load_in_8bit


def test_base_model_keeps_its_name(load: Any) -> None:
    config = load()
    assert config.base_model == "tiny-llama-python"
    assert config.input_features[0].preprocessing.pretrained_model_name_or_path == "tiny-llama-python"


def test_preset_names_of_ludwig_are_resolved(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    from ludwig_peft_plugin.config import base_model

    monkeypatch.setitem(base_model.MODEL_PRESETS, "small", "tiny-llama-python")
    assert load(base_model="small").base_model == "tiny-llama-python"


@pytest.mark.parametrize(
    ("sections", "length"),
    [
        ({}, CONTEXT // 2),
        ({"generation": {"max_new_tokens": 32}}, 32),
        ({"generation": {"max_new_tokens": 7}}, 7),
        ({"generation": {"max_new_tokens": None}}, CONTEXT // 2),
        ({"preprocessing": {"global_max_sequence_length": 300}}, 300),
        ({"preprocessing": {"global_max_sequence_length": 8}}, 32),
        ({"preprocessing": {"global_max_sequence_length": 2 * CONTEXT}}, CONTEXT // 2),
        ({"output_features": [{"name": "o", "type": "text", "preprocessing": {"max_sequence_length": 40}}]}, 40),
    ],
)
def test_answer_length(load: Any, sections: Any, length: int) -> None:
    config = load(**sections)
    assert config.generation.max_new_tokens == length
    assert config.output_features[0].decoder.max_new_tokens == length


def test_empty_sections_mean_their_defaults(load: Any) -> None:
    empty = dict.fromkeys(("prompt", "generation", "preprocessing", "defaults", "export", "hyperopt"))
    config = load(**empty, trainer={**FINETUNE, "learning_rate_scheduler": None})
    assert config.to_dict() == load(prompt=...).to_dict()


def test_numbers_that_yaml_reads_as_text(load: Any) -> None:
    hyperopt = {
        "executor": {"type": "ray"},
        "search_alg": {"type": "variant_generator"},
        "parameters": {"trainer.learning_rate": {"space": "loguniform", "lower": "1e-5", "upper": "1e-3"}},
    }
    config = load(trainer={**FINETUNE, "learning_rate": "2e-4"}, hyperopt=hyperopt)
    assert config.trainer.learning_rate == 2e-4
    assert config.hyperopt.parameters["trainer.learning_rate"]["lower"] == 1e-5


def test_generation_options_whose_types_ludwig_gets_wrong(load: Any) -> None:
    config = load(generation={"exponential_decay_length_penalty": [8, 1.1], "sequence_bias": [[[1, 2], -3.0]]})
    assert config.generation.exponential_decay_length_penalty == (8, 1.1)
    assert config.generation.sequence_bias == [[[1, 2], -3.0]]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainer": {**FINETUNE, "effective_batch_size": 3, "batch_size": 2}}, "trainer: `effective_batch_size` (3)"),
        ({"prompt": {"template": "{a}", "retrieval": {"k": 1}}}, "prompt: k must be 0 if retrieval type is None."),
        ({"quantization": {"bits": 4, "mode": "float8"}}, "`quantization.mode` is only supported for"),
        ({"adapters": {"adapters": {"a": {"type": "lora"}}}}, "Cannot set both `adapter:` and `adapters:`"),
        ({"export": [{"format": "merged", "path": "../x"}]}, "export.path: '../x' leaves the run directory"),
        ({"export": ["merged", "merged"]}, "export: two entries write to"),
    ],
)
def test_checks_between_options_are_told_in_a_line(load: Any, sections: Any, message: str) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        load(**sections)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_check_of_an_adapter_class_is_told_in_a_line(load: Any) -> None:
    adapter = {"type": "lora", "bias": "all", "bias_type": "lora_only"}
    with pytest.raises(ConfigValidationError, match=r"^adapter: .*two names of one option") as caught:
        load(adapter=adapter)
    assert len(str(caught.value).splitlines()) == 1


def test_base_model_folder_that_is_missing(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigValidationError, match="does not exist"):
        load(base_model=str(tmp_path / "nowhere"))


def test_base_model_that_the_hub_does_not_give(load: Any) -> None:
    with pytest.raises(
        ConfigValidationError, match="'someone/nothing' cannot be loaded from the Hugging Face hub"
    ) as caught:
        load(base_model="someone/nothing")
    assert len(str(caught.value).splitlines()) <= 3


def test_base_model_folder_without_config(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigValidationError, match=r"holds no config\.json"):
        load(base_model=str(tmp_path))


def test_base_model_folder_without_weights(load: Any, tmp_path: Path) -> None:
    from ludwig_peft_plugin.model.base_model import resolve_base_model

    shipped = Path(resolve_base_model("tiny-llama-python"))
    (tmp_path / "config.json").write_bytes((shipped / "config.json").read_bytes())
    with pytest.raises(ConfigValidationError, match="holds no weights"):
        load(base_model=str(tmp_path))


def test_category_outputs_keep_ludwigs_answer_length(load: Any) -> None:
    match = {"positive": {"type": "contains", "value": "good"}, "negative": {"type": "contains", "value": "bad"}}
    output = {
        "name": "label",
        "type": "category",
        "preprocessing": {"fallback_label": "negative"},
        "decoder": {"type": "category_extractor", "match": match},
    }
    config = load(output_features=[output], adapter=..., trainer=..., prompt={"task": "Say what it is."})
    assert config.generation.max_new_tokens == 32
    assert config.output_features[0].decoder.match == match
