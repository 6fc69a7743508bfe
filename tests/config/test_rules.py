"""Combinations that cannot work, and options that would change nothing, are errors that say what works."""

from typing import Any

import pytest

FINETUNE = {"type": "finetune"}
NONE = {"type": "none"}

COMBINATIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"trainer": ...}, "trainer.type", "`finetune` to train adapter `lora`"),
    ({"trainer": {"epochs": 1}}, "trainer.type", "`finetune` to train adapter `lora`"),
    ({"trainer": {"epochs": 1}, "adapter": ...}, "trainer.type", "`finetune` to train the base"),
    ({"trainer": NONE}, "trainer.type", "adapter.pretrained_adapter_weights"),
    ({"quantization": {"bits": 4}, "adapter": ...}, "quantization", "add `adapter: qlora`"),
    ({"quantization": {"bits": 4}, "adapter": "frod"}, "adapter.type", "use one of `adalora`"),
    (
        {"quantization": {"bits": 8}, "adapter": ..., "adapters": {"adapters": {"a": {"type": "frod"}}}},
        "adapters.adapters.a.type",
        "cannot be trained on a quantised base",
    ),
    ({"quantization": None, "adapter": "qlora"}, "quantization", "use `lora` instead"),
    ({"export": ["adapter"], "adapter": ...}, "export[0]", "export `merged`"),
    ({"export": ["merged"], "adapter": ..., "trainer": NONE}, "export", "trainer.type: finetune"),
    ({"dataset": "a.csv", "training_set": "b.csv"}, "training_set", "keep one"),
    ({"dataset": "a.csv", "test_set": "b.csv"}, "test_set", "needs training_set"),
    (
        {"trainer": {**FINETUNE, "steps_per_checkpoint": 2, "checkpoints_per_epoch": 2}},
        "trainer.checkpoints_per_epoch",
        "keep one",
    ),
]

WITHOUT_EFFECT: list[tuple[dict[str, Any], str, str]] = [
    ({"trainer": {**FINETUNE, "loss_balancing": "famo"}}, "trainer.loss_balancing", "a language model has one"),
    ({"trainer": {**FINETUNE, "modality_dropout": 0.5}}, "trainer.modality_dropout", "adapter.dropout"),
    ({"trainer": {**FINETUNE, "contrastive_pretrain_epochs": 1}}, "trainer.contrastive_pretrain_epochs", "remove it"),
    ({"trainer": {**FINETUNE, "bucketing_field": "a"}}, "trainer.bucketing_field", "remove it"),
    (
        {"trainer": {**FINETUNE, "regularization_lambda": 0.1}},
        "trainer.regularization_lambda",
        "optimizer.weight_decay",
    ),
    ({"trainer": {**FINETUNE, "base_learning_rate": 0.1}}, "trainer.base_learning_rate", "use learning_rate"),
    ({"trainer": {**NONE, "packing": True}, "adapter": ...}, "trainer.packing", "trainer.type `finetune`"),
    ({"trainer": {**NONE, "epochs": 7}, "adapter": ...}, "trainer.epochs", "trainer.type `finetune`"),
    (
        {"trainer": {**FINETUNE, "learning_rate_scheduler": {"decay": "cosine", "decay_rate": 0.5}}},
        "trainer.learning_rate_scheduler.decay_rate",
        "give decay: exponential",
    ),
    (
        {"trainer": {**FINETUNE, "learning_rate_scheduler": {"decay": "wsd", "warmup_fraction": 0.5}}},
        "trainer.learning_rate_scheduler.warmup_fraction",
        "use wsd_warmup_fraction",
    ),
    (
        {"trainer": {**FINETUNE, "learning_rate_scheduler": {"reduce_on_plateau_rate": 0.5}}},
        "trainer.learning_rate_scheduler.reduce_on_plateau_rate",
        "reduce_on_plateau > 0",
    ),
    ({"generation": {"max_length": 99}}, "generation.max_length", "max_new_tokens"),
    ({"generation": {"penalty_alpha": 0.6}}, "generation.penalty_alpha", "remove it"),
    (
        {"input_features": [{"name": "a", "type": "text", "preprocessing": {"tokenizer": "space"}}]},
        "input_features[0].preprocessing.tokenizer",
        "its own tokenizer",
    ),
    (
        {"input_features": [{"name": "a", "type": "text", "encoder": {"type": "passthrough", "adapter": {"r": 1}}}]},
        "input_features[0].encoder.adapter",
        "top-level adapter",
    ),
    (
        {"output_features": [{"name": "a", "type": "text", "decoder": {"max_new_tokens": 9}}]},
        "output_features[0].decoder.max_new_tokens",
        "generation section",
    ),
    (
        {"output_features": [{"name": "a", "type": "text", "loss": {"type": "sequence_softmax_cross_entropy"}}]},
        "output_features[0].loss.type",
        "cross-entropy of the target tokens",
    ),
]


def ids(cases: list[tuple[dict[str, Any], str, str]]) -> list[str]:
    return [f"{path}-{index}" for index, (_, path, _) in enumerate(cases)]


@pytest.mark.parametrize(("sections", "path", "text"), COMBINATIONS, ids=ids(COMBINATIONS))
def test_combination_that_cannot_work(errors: Any, sections: Any, path: str, text: str) -> None:
    found = errors(**sections)
    assert list(found) == [path]
    assert text in found[path]


@pytest.mark.parametrize(("sections", "path", "text"), WITHOUT_EFFECT, ids=ids(WITHOUT_EFFECT))
def test_option_without_effect(errors: Any, sections: Any, path: str, text: str) -> None:
    found = errors(**sections)
    assert list(found) == [path]
    assert text in found[path]


def test_defaults_of_options_without_effect_pass(errors: Any) -> None:
    assert errors(trainer={**FINETUNE, "modality_dropout": 0.0, "loss_balancing": "none"}) == {}


def test_what_ludwig_fills_in_passes(errors: Any) -> None:
    own = {"tokenizer": "hf_tokenizer", "pretrained_model_name_or_path": "tiny-llama-python"}
    assert errors(input_features=[{"name": "a", "type": "text", "preprocessing": own}]) == {}


def test_zero_shot_without_a_trainer_section(errors: Any) -> None:
    assert errors(trainer=..., adapter=...) == {}


def test_trained_weights_may_be_used_without_training(errors: Any) -> None:
    assert errors(trainer=NONE, adapter={"type": "lora", "pretrained_adapter_weights": "folder"}) == {}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapter", ["lora", "qlora", "dora"])
def test_adapters_on_a_quantised_base(errors: Any, adapter: str, bits: int) -> None:
    assert errors(adapter=adapter, quantization={"bits": bits}) == {}


def test_merging_into_a_quantised_base_is_allowed(errors: Any) -> None:
    adapter = {"type": "qlora", "postprocessor": {"merge_adapter_into_base_model": True}}
    assert errors(adapter=adapter, export=["merged"]) == {}


def test_adapter_that_cannot_be_merged(errors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ludwig.schema.llms.peft import adapter_registry

    monkeypatch.setattr(adapter_registry["dora"], "mergeable", False)
    adapter = {"type": "dora", "postprocessor": {"merge_adapter_into_base_model": True}}
    found = errors(adapter=adapter, export=["adapter", "merged"])
    assert list(found) == ["adapter.postprocessor.merge_adapter_into_base_model", "export[1]"]
