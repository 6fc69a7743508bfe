"""Adapters that work between optimiser steps, in ordinary Ludwig models: AdaLoRA's ranks and AdaMSS's subspaces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from killed_runs import KillAt, Killed
from ludwig.callbacks import Callback
from safetensors.torch import load_file

from ludwig_peft_plugin.encoders.step_hooks import optimizer_steps
from ludwig_peft_plugin.errors import AdapterError, CheckpointError

# Ludwig warns about keys that it adds to encoder sections itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

Make = Callable[..., dict[str, Any]]
QUIET = {"skip_save_processed_input": True, "skip_save_log": True}
ADALORA = {"type": "adalora", "init_r": 6, "target_r": 2, "delta_t": 1, "dropout": 0.0}
ADAMSS = {
    "type": "adamss",
    "r": 8,
    "num_subspaces": 3,
    "use_asa": True,
    "asa_target_subspaces": 9,
    "init_warmup": 2,
    "final_warmup": 10,
    "mask_interval": 2,
}
LAYERS = 12  # linear layers of the encoder without its pooler
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


class Watch(Callback):
    """Keeps what the trainer's hooks hold after each batch."""

    def __init__(self) -> None:
        self.totals: set[int] = set()
        self.taken = 0
        self.frozen: dict[str, list[torch.Tensor]] = {}

    def on_batch_end(self, trainer: Any, progress_tracker: Any, save_path: str, **kwargs: Any) -> None:
        steps = trainer._steps
        self.taken = steps.state()["taken"]
        (hooks,) = steps.hooks.values()
        if hasattr(hooks, "_config"):
            self.totals.add(hooks._config.total_step)
        for name, value in getattr(hooks, "_frozen", {}).items():
            self.frozen.setdefault(name, []).append(hooks._parameters()[name].detach().clone() - value)


def adapted(model: Any) -> Any:
    return model.model.input_features.get("code").encoder_obj.transformer.module


def latest(run: Path | str) -> dict[str, torch.Tensor]:
    """Return the trained weights at the end of a run."""
    return load_file(Path(run) / "model" / "training_checkpoints" / "latest.ckpt.safetensors")


def make(make_config: Make, adapter: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    config = make_config(adapter, reduce_output="mean")
    config["trainer"] |= {"epochs": 4, "skip_all_evaluation": True, **trainer}
    return config


def test_optimiser_steps_are_counted_as_ludwig_takes_them() -> None:
    assert optimizer_steps(12, 4, 1, 4) == 12
    assert optimizer_steps(12, 4, 2, 4) == 6
    assert optimizer_steps(10, 5, 2, 5) == 6  # 2, 4 and the checkpoint at 5, twice
    assert optimizer_steps(10, 5, 2, 3) == 6  # 2, 3, 4; then 6 (a checkpoint), 7, 9; 10 is lost
    assert optimizer_steps(3, 5, 4, 3) == 1


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")  # of Ludwig, which accumulates so
@pytest.mark.parametrize("accumulation", [1, 3])
def test_adalora_takes_ranks_away_and_a_loaded_model_predicts_the_same(
    accumulation: int, make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig.api import LudwigModel

    config = make(make_config, ADALORA, gradient_accumulation_steps=accumulation)
    watch = Watch()
    model = new_model(config, callbacks=[watch])
    output = model.train(dataset=table, output_directory=str(tmp_path), **QUIET).output_directory
    steps = 4 * (4 if accumulation == 1 else 2)
    assert watch.totals == {steps}
    assert watch.taken == steps
    scales = {name: value for name, value in latest(output).items() if ".lora_E." in name}
    assert len(scales) == LAYERS
    assert sum(int((value != 0).sum()) for value in scales.values()) == 2 * LAYERS
    loaded = LudwigModel.load(f"{output}/model", logging_level=40)
    first, _ = model.predict(dataset=table, skip_save_predictions=True)
    second, _ = loaded.predict(dataset=table, skip_save_predictions=True)
    np.testing.assert_array_equal(first["size_predictions"], second["size_predictions"])


def test_the_orthogonality_term_has_an_effect(
    make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    def distance(weight: float) -> float:
        model = new_model(make(make_config, ADALORA | {"orth_reg_weight": weight}))
        model.train(dataset=table, output_directory=str(tmp_path / f"{weight:g}"), **QUIET)
        factors = [p.detach() for name, p in adapted(model).named_parameters() if ".lora_A." in name]
        return sum(float((a @ a.T - torch.eye(len(a), device=a.device)).norm()) for a in factors)

    assert distance(10.0) < 0.9 * distance(0.0)


def test_adamss_freezes_subspaces(make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path) -> None:
    watch = Watch()
    model = new_model(make(make_config, ADAMSS), callbacks=[watch])
    model.train(dataset=table, output_directory=str(tmp_path), **QUIET)
    subspaces = {name.rpartition(".adamss_")[0] + name[-1] for name in watch.frozen}
    # PEFT keeps those above the score of the last one that it would keep, so one less.
    assert len(subspaces) == 3 * LAYERS - ADAMSS["asa_target_subspaces"] + 1
    assert all(not difference.any() for kept in watch.frozen.values() for difference in kept)


@pytest.mark.parametrize("adapter", [ADALORA, ADAMSS], ids=["adalora", "adamss"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    adapter: dict[str, Any], make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    config = make(make_config, adapter)
    config["input_features"][0]["encoder"]["pretrained_kwargs"] = NO_DROPOUT
    whole = new_model(copy.deepcopy(config)).train(dataset=table, output_directory=str(tmp_path / "whole"), **QUIET)
    with pytest.raises(Killed):
        new_model(copy.deepcopy(config), callbacks=[KillAt(epoch=2)]).train(
            dataset=table, output_directory=str(tmp_path / "parts"), **QUIET
        )
    (run,) = (tmp_path / "parts").iterdir()
    new_model(copy.deepcopy(config)).train(dataset=table, model_resume_path=str(run), **QUIET)
    expected, resumed = latest(whole.output_directory), latest(run)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


def test_a_checkpoint_without_the_state_cannot_be_resumed(
    make_config: Make, new_model: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    from ludwig_peft_plugin.encoders.trainer import STATE

    config = make(make_config, ADALORA)
    with pytest.raises(Killed):
        new_model(copy.deepcopy(config), callbacks=[KillAt(epoch=2)]).train(
            dataset=table, output_directory=str(tmp_path), **QUIET
        )
    (run,) = tmp_path.iterdir()
    path = run / "model" / "training_checkpoints" / "latest.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["optim_state"].pop(STATE)["taken"] == 8
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="input feature 'code' keeps between steps"):
        new_model(config).train(dataset=table, model_resume_path=str(run), **QUIET)


@pytest.mark.parametrize(
    ("adapter", "trainer", "message"),
    [
        (ADALORA | {"tinit": 9, "tfinal": 9}, {}, r"input feature 'code': adapter: tinit: 9 and tfinal: 9 leave no"),
        (ADALORA, {"optimizer": {"type": "lbfgs"}}, r"trainer\.optimizer: lbfgs .* code cannot"),
    ],
)
def test_what_cannot_work_stops_before_the_first_step(
    adapter: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    make_config: Make,
    new_model: Any,
    table: pd.DataFrame,
    tmp_path: Path,
) -> None:
    with pytest.raises(AdapterError, match=message):
        new_model(make(make_config, adapter, **trainer)).train(dataset=table, output_directory=str(tmp_path), **QUIET)
