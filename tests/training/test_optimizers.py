"""Options that an optimiser does not have are left out at their defaults and refused when set."""

import pytest
import torch
from ludwig.error import ConfigValidationError
from ludwig.schema.optimizers import AdamWOptimizerConfig, optimizer_registry

from ludwig_peft_plugin.training.optimizers import parameters_on, supported_arguments

PAGED = optimizer_registry["paged_adamw_8bit"][1]


class Optimizer:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
        pass


def test_defaults_of_dropped_options_are_left_out():
    config = PAGED()
    arguments = {name: value for name, value in config.to_dict().items() if name != "type"}
    assert "block_wise" in arguments
    assert supported_arguments(Optimizer, arguments, config).keys() == {"betas", "eps", "weight_decay", "amsgrad"}


def test_a_dropped_option_that_was_set_is_an_error():
    config = PAGED(block_wise=False)
    arguments = {name: value for name, value in config.to_dict().items() if name != "type"}
    with pytest.raises(ConfigValidationError, match=r"trainer\.optimizer\.block_wise"):
        supported_arguments(Optimizer, arguments, config)


def test_torch_optimisers_keep_everything():
    config = AdamWOptimizerConfig(weight_decay=0.3)
    arguments = {"lr": 0.1} | {name: value for name, value in config.to_dict().items() if name != "type"}
    assert supported_arguments(torch.optim.AdamW, arguments, config) == arguments


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_fused_on_a_gpu_and_only_there(optimizer):
    config = AdamWOptimizerConfig()
    arguments = {"lr": 0.1, "weight_decay": 0.3}
    with parameters_on("cuda"):
        assert supported_arguments(optimizer, arguments, config) == {**arguments, "fused": True}
        assert supported_arguments(torch.optim.SGD, {"lr": 0.1}, config) == {"lr": 0.1}
        assert supported_arguments(optimizer, {**arguments, "foreach": True}, config) == {**arguments, "foreach": True}
    with parameters_on("cpu"):
        assert supported_arguments(optimizer, arguments, config) == arguments
    assert supported_arguments(optimizer, arguments, config) == arguments
