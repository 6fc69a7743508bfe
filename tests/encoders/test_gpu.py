"""Encoders with adapters on a GPU: training, loading, work between steps, and the encoder `llm` on a 4-bit base."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # of torch, by frod
]


@pytest.mark.parametrize(("kind", "adapter"), [("bert", "lora"), ("bert", "dora"), ("llm", "lora"), ("llm", "qlora")])
def test_trains_and_loads_on_a_gpu(
    kind: str,
    adapter: str,
    make_config: Callable[..., dict[str, Any]],
    new_model: Any,
    table: pd.DataFrame,
    tmp_path: Path,
) -> None:
    from ludwig.api import LudwigModel

    config = make_config({"type": adapter, "target_modules": "all-linear"}, kind=kind)
    if kind == "llm":
        config["combiner"] = {"type": "sequence_concat", "reduce_output": "mean"}
    model = new_model(config)
    output = model.train(dataset=table, output_directory=str(tmp_path), skip_save_processed_input=True).output_directory
    encoder = model.model.input_features.get("code").encoder_obj
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    first, _ = model.predict(dataset=table, skip_save_predictions=True)
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    second, _ = loaded.predict(dataset=table, skip_save_predictions=True)
    columns = [frame["area_probabilities_io"].to_numpy(dtype=np.float64) for frame in (first, second)]
    np.testing.assert_allclose(columns[0], columns[1], atol=1e-5)


ASA = {"use_asa": True, "asa_target_subspaces": 9, "init_warmup": 1, "final_warmup": 6, "mask_interval": 1}


@pytest.mark.parametrize(
    ("kind", "adapter", "mixed"),
    [
        ("bert", {"type": "adalora", "init_r": 6, "target_r": 2, "delta_t": 1}, False),
        ("bert", {"type": "adalora", "init_r": 6, "target_r": 2, "delta_t": 1}, True),
        ("llm", {"type": "adalora", "init_r": 6, "target_r": 2, "delta_t": 1}, False),
        ("bert", {"type": "adamss", "num_subspaces": 3, **ASA}, False),
        ("bert", {"type": "frod"}, False),
        ("bert", {"type": "psoft"}, False),
    ],
    ids=["adalora", "adalora-mixed", "adalora-llm", "adamss", "frod", "psoft"],
)
def test_work_between_steps_and_parts_made_of_the_weights(
    kind: str,
    adapter: dict[str, Any],
    mixed: bool,
    make_config: Callable[..., dict[str, Any]],
    new_model: Any,
    table: pd.DataFrame,
    tmp_path: Path,
) -> None:
    from ludwig.api import LudwigModel

    config = make_config(adapter, kind=kind, **({} if kind == "llm" else {"reduce_output": "mean"}))
    config["trainer"] |= {"epochs": 4, "skip_all_evaluation": True, "use_mixed_precision": mixed}
    if kind == "llm":
        config["combiner"] = {"type": "sequence_concat", "reduce_output": "mean"}
    model = new_model(config)
    output = model.train(dataset=table, output_directory=str(tmp_path), skip_save_processed_input=True).output_directory
    encoder = model.model.input_features.get("code").encoder_obj
    trained = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(bool(torch.isfinite(p).all()) for p in trained.values())
    scales = [p for name, p in trained.items() if ".lora_E." in name]
    assert bool(scales) == (adapter["type"] == "adalora")
    if scales and not mixed:  # steps that overflow in 16 bits are not counted, so the last ranks may stay
        assert sum(int((p != 0).sum()) for p in scales) == 2 * len(scales)
    first, _ = model.predict(dataset=table, skip_save_predictions=True)
    loaded = LudwigModel.load(f"{output}/model", logging_level=logging.ERROR)
    second, _ = loaded.predict(dataset=table, skip_save_predictions=True)
    columns = [frame["area_probabilities_io"].to_numpy(dtype=np.float64) for frame in (first, second)]
    np.testing.assert_allclose(columns[0], columns[1], atol=1e-5)
