"""Searches over adapter types: what a trial's config is, and that Optuna's executor can be asked for."""

import pytest
import yaml

from ludwig_peft_plugin.config.hyperopt import OptunaExecutorConfig, trial_config


@pytest.fixture
def search(make_config):
    """Return a function that makes a config with a search over `parameters`."""

    def make(parameters, **executor):
        section = {
            "output_feature": "output",
            "executor": {"type": "optuna", "num_samples": 2, **executor},
            "search_alg": {"type": "variant_generator"},
            "parameters": parameters,
        }
        return make_config(hyperopt=section)

    return make


def drawn(config, parameters):
    """Return the adapter and trainer of a trial, by way of what Ludwig calls."""
    import copy

    import ludwig.hyperopt.utils as utils
    from ludwig.schema.model_types.base import ModelConfig

    trial = copy.deepcopy(config)
    assert utils.substitute_parameters(trial, parameters) is trial  # Ludwig's Optuna executor uses what it passed in
    ModelConfig.from_dict(trial)
    return trial["adapter"], trial["trainer"]


def test_a_drawn_section_takes_the_place_of_the_whole(search):
    adapter, trainer = drawn(search({}), {"adapter": {"type": "ia3"}, "trainer.learning_rate": 1e-2})
    assert adapter == {"type": "ia3"}
    assert trainer["learning_rate"] == 1e-2
    adapter, _ = drawn(search({}), {"adapter": {"type": "lora", "r": 2}})
    assert adapter == {"type": "lora", "r": 2}


def test_single_options_are_left_out_where_the_type_has_none(search):
    parameters = {"adapter.type": "ia3", "adapter.r": 8}
    assert drawn(search({}), parameters)[0] == {"type": "ia3"}
    adapter, _ = drawn(search({}), {"adapter.type": "lora", "adapter.r": 8})
    assert adapter == {"type": "lora", "r": 8, "dropout": 0.1, "target_modules": "all-linear"}
    assert drawn(search({}), {"adapter.type": "dora", "adapter.r": 8})[0] == {"type": "dora", "r": 8}


def test_parts_of_a_config_are_drawn_together(search):
    category = {"adapter": {"type": "ia3"}, "trainer": {"learning_rate": 2e-2}}
    adapter, trainer = drawn(search({}), {".": category})
    assert adapter == {"type": "ia3"}
    assert (trainer["learning_rate"], trainer["epochs"]) == (2e-2, 2)


def test_what_is_no_adapter_is_ludwigs_own(search):
    config = search({})
    merged = {**config, "trainer": {"type": "finetune", "learning_rate": 1.0}}
    result = trial_config(merged, config, {"trainer.learning_rate": 1.0})
    assert result == {name: value for name, value in merged.items() if name != "hyperopt"}


def test_the_optuna_executor_survives_ludwigs_upgrade_of_old_configs(search):
    from ludwig.schema.model_types.base import ModelConfig
    from ludwig.utils.backward_compatibility import upgrade_config_dict_to_latest_version

    space = {"adapter": {"space": "choice", "categories": [{"type": "lora"}, {"type": "ia3"}]}}
    upgraded = upgrade_config_dict_to_latest_version(search(space, sampler="tpe"))
    config = ModelConfig.from_dict(upgraded)
    assert isinstance(config.hyperopt.executor, OptunaExecutorConfig)
    assert config.hyperopt.executor.sampler == "tpe"
    again = ModelConfig.from_dict(config.to_dict())
    assert again.hyperopt.executor.type == "optuna"


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"cpu_resources_per_trial": 3}, "cpu_resources_per_trial: is of executor `ray`, not of `optuna`"),
        ({"sampler": "best"}, "sampler"),
    ],
)
def test_options_of_the_other_executor_are_refused(search, executor, message):
    from ludwig.error import ConfigValidationError
    from ludwig.schema.model_types.base import ModelConfig

    with pytest.raises(ConfigValidationError, match=message):
        ModelConfig.from_dict(search({}, **executor))


def test_every_category_of_the_shipped_search_is_a_config(registered):
    from pathlib import Path

    path = Path(__file__).resolve().parents[2] / "configs" / "hyperopt_methods.yaml"
    config = yaml.safe_load(path.read_text())
    for category in config["hyperopt"]["parameters"]["adapter"]["categories"]:
        assert drawn(config, {"adapter": category})[0] == category


def test_what_a_trial_in_another_process_is_given_survives_the_way(search, new_model, rows):
    """Ray pickles the config and the prepared data for its worker processes."""
    import pickle

    import numpy as np

    config = search({"adapter": {"space": "choice", "categories": [{"type": "lora"}, {"type": "ia3"}]}})
    data = new_model(config).preprocess(dataset=rows)
    again, sent = pickle.loads(pickle.dumps((config, data.training_set)))
    assert again == config
    assert len(sent) == len(data.training_set) == 24
    for index in range(len(sent)):
        assert np.array_equal(sent.input_ids[index], data.training_set.input_ids[index])
    assert sent.frame.equals(data.training_set.frame)
    assert sent.pad_id == data.training_set.pad_id
