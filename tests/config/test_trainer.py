"""The trainer options of the plugin: their values, what cannot go together, and configs saved with them."""

from typing import Any

import pytest

FINETUNE = {"type": "finetune"}
NONE = {"type": "none"}

ACCEPTED: list[dict[str, Any]] = [
    {"packing": True},
    {"packing": True, "batch_size": 8},
    {"packing": True, "batch_size": "auto"},
    {"packing": True, "tokens_per_batch": 4096, "gradient_accumulation_steps": 4},
    {"tokens_per_batch": 4096},
    {"tokens_per_batch": 4096, "batch_size": 1, "packing": False},
    {"tokens_per_batch": None, "batch_size": 8, "effective_batch_size": 16},
    {"enable_gradient_checkpointing": True, "checkpoint_offload": True},
    {"enable_gradient_checkpointing": True, "checkpoint_layers": 0.5},
    {"checkpoint_layers": 1.0, "checkpoint_offload": False},
    {"compile": True, "packing": True},
]

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tokens_per_batch": 0}, "tokens_per_batch", "whole number >= 1"),
    ({"tokens_per_batch": "auto"}, "tokens_per_batch", "whole number >= 1"),
    ({"packing": "yes"}, "packing", "true or false"),
    ({"tokens_per_batch": 512, "batch_size": "auto"}, "batch_size", "remove one of them"),
    ({"tokens_per_batch": 512, "batch_size": 8}, "batch_size", "remove one of them"),
    ({"packing": True, "effective_batch_size": 16}, "effective_batch_size", "gradient_accumulation_steps"),
    ({"tokens_per_batch": 512, "effective_batch_size": 16}, "effective_batch_size", "gradient_accumulation_steps"),
    ({"packing": True, "increase_batch_size_on_plateau": 2}, "increase_batch_size_on_plateau", "remove it"),
    ({"checkpoint_offload": True}, "checkpoint_offload", "enable_gradient_checkpointing: true"),
    ({"checkpoint_layers": 0.5}, "checkpoint_layers", "enable_gradient_checkpointing: true"),
    ({"checkpoint_layers": 0, "enable_gradient_checkpointing": True}, "checkpoint_layers", "> 0 and <= 1"),
    ({"tokens_per_batches": 512}, "tokens_per_batches", "`tokens_per_batch`"),
    ({"pack": True}, "pack", "`packing`"),
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_accepted(errors, options):
    assert errors(trainer={**FINETUNE, **options}) == {}


@pytest.mark.parametrize(("options", "name", "remedy"), REFUSED)
def test_refused_with_what_works(errors, options, name, remedy):
    found = errors(trainer={**FINETUNE, **options})
    assert list(found) == [f"trainer.{name}"]
    assert remedy in found[f"trainer.{name}"]


@pytest.mark.parametrize(
    "options", [{"tokens_per_batch": 512}, {"packing": True}, {"checkpoint_offload": True}, {"compile": True}]
)
def test_without_training_they_are_refused(errors, options):
    found = errors(trainer={**NONE, **options}, adapter=...)
    (name,) = options
    assert list(found) == [f"trainer.{name}"]
    assert "`finetune`" in found[f"trainer.{name}"]


def test_they_reach_the_config_object_and_a_saved_config(load):
    from ludwig.schema.model_types.base import ModelConfig

    trainer = {**FINETUNE, "packing": True, "tokens_per_batch": 512, "enable_gradient_checkpointing": True}
    loaded = load(trainer={**trainer, "checkpoint_offload": True})
    again = ModelConfig.from_dict(loaded.to_dict())
    for config in (loaded, again):
        assert config.trainer.packing is True
        assert config.trainer.tokens_per_batch == 512
        assert config.trainer.checkpoint_offload is True
    assert again.to_dict()["trainer"] == loaded.to_dict()["trainer"]


def test_defaults_are_those_of_a_plain_run(load):
    trainer = load(trainer=FINETUNE).trainer
    assert (trainer.batch_size, trainer.tokens_per_batch, trainer.packing) == (1, None, False)
    assert trainer.checkpoint_layers == 1.0
    assert (trainer.compile, trainer.enable_gradient_checkpointing, trainer.checkpoint_offload) == (False,) * 3


def test_other_trainers_keep_ludwigs_options():
    from ludwig.schema.trainer import get_llm_trainer_cls

    assert "tokens_per_batch" in get_llm_trainer_cls("finetune").model_fields
    assert "tokens_per_batch" not in get_llm_trainer_cls("dpo").model_fields


def test_every_option_is_described():
    from ludwig_peft_plugin.config.sections import options
    from ludwig_peft_plugin.config.trainer import FineTuneTrainerConfig

    own = [option for option in options(FineTuneTrainerConfig).values() if option.declared_in is FineTuneTrainerConfig]
    assert len(own) == 8
    assert all(option.description for option in own)
