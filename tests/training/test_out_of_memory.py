"""Running out of GPU memory is a message that names what would help, in GiB that an estimate confirms."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.errors import PluginError

ERROR = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 0.72 GiB of which 300.00 MiB is "
    "free. Including non-PyTorch memory, this process has 0.50 GiB memory in use. Of the allocated memory 0.40 GiB is "
    "allocated by PyTorch, and 90.00 MiB is reserved by PyTorch but unallocated."
)
GIB = 2**30


@pytest.fixture
def config_obj(registered: None) -> Any:
    from ludwig.schema.model_types.base import ModelConfig

    return ModelConfig.from_dict(
        {
            "model_type": "llm",
            "base_model": "tiny-llama-python",
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "preprocessing": {"global_max_sequence_length": 256},
            "adapter": {"type": "lora", "target_modules": "all-linear"},
            "trainer": {"type": "finetune", "batch_size": 64},
        }
    )


def micro_batch(rows: int, length: int) -> MicroBatch:
    total = rows * length
    tokens = torch.zeros(total, dtype=torch.int64)
    ends = torch.arange(0, total + 1, length, dtype=torch.int32)
    return MicroBatch(np.arange(rows), tokens, tokens, ends, length, tokens[rows:], tokens[rows:], tokens[rows:], total)


def message(config_obj: Any, activity: Any, batch: MicroBatch | None = None) -> str:
    from ludwig_peft_plugin.training.out_of_memory import GpuMemoryError, explained_out_of_memory

    with (
        pytest.raises(GpuMemoryError) as caught,
        explained_out_of_memory(config_obj, activity, lambda: batch),
    ):
        raise torch.OutOfMemoryError(ERROR)
    assert isinstance(caught.value, PluginError)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


def named(text: str) -> list[tuple[str, float, float]]:
    """Return the settings that a message names, with GiB saved and GiB needed then."""
    pattern = r"^  (.+)  \(saves ([\d.]+) GiB, ([\d.]+) GiB then\)$"
    return [(change, float(saves), float(then)) for change, saves, then in re.findall(pattern, text, re.MULTILINE)]


def test_training(config_obj: Any) -> None:
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    batch = micro_batch(64, 256)
    text = message(config_obj, "training", batch)
    assert text.splitlines()[0] == (
        "The GPU ran out of memory while training (micro-batch: 16,384 tokens in 64 sequences): it has 0.72 GiB, "
        "0.29 GiB were free, 1.50 GiB more were asked for."
    )
    needed = Estimator(config_obj).estimate(BatchShape.of(batch)).needed / GIB
    assert f"By its estimate this config needs {needed:.2f} GiB while training." in text
    found = named(text)
    assert len(found) == 3
    assert [saves for _, saves, _ in found] == sorted((saves for _, saves, _ in found), reverse=True)
    assert all(saves + then == pytest.approx(needed, abs=0.011) for _, saves, then in found)
    assert {change for change, _, _ in found} >= {"trainer.enable_gradient_checkpointing: true"}
    config_obj.trainer.enable_gradient_checkpointing = True
    then = Estimator(config_obj).estimate(BatchShape.of(batch)).needed / GIB
    stated = next(then for change, _, then in found if "checkpointing" in change)
    assert stated == pytest.approx(then, abs=0.01)
    assert "ludwig-peft estimate" in text


def test_evaluating_names_the_evaluation_batch(config_obj: Any) -> None:
    config_obj.trainer.eval_batch_size = 256
    text = message(config_obj, "evaluating", micro_batch(256, 200))
    changes = [change for change, _, _ in named(text)]
    assert any(change.startswith("trainer.eval_batch_size: ") for change in changes)
    assert not any("checkpointing" in change or "accumulation" in change for change in changes)


def test_loading_names_quantisation(config_obj: Any) -> None:
    config_obj.precision = "float32"
    text = message(config_obj, "loading the base model")
    assert "micro-batch" not in text
    assert "while loading the base model: it has 0.72 GiB" in text
    config_obj.precision = "bfloat16"
    assert "No setting of it would lower that much" in message(config_obj, "loading the base model")


def test_the_run_s_error_is_told_where_no_estimate_can_be_made(
    config_obj: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no estimate today\nand a second line")

    monkeypatch.setattr("ludwig_peft_plugin.estimate.memory.Estimator.__init__", refuse)
    text = message(config_obj, "training")
    assert "ran out of memory while training" in text
    assert "cannot be worked out here (no estimate today)" in text


def test_other_errors_and_success_pass_through(config_obj: Any) -> None:
    from ludwig_peft_plugin.training.out_of_memory import explained_out_of_memory

    with explained_out_of_memory(config_obj, "training"):
        pass
    with pytest.raises(ZeroDivisionError), explained_out_of_memory(config_obj, "training"):
        raise ZeroDivisionError


def test_a_message_without_numbers(config_obj: Any) -> None:
    from ludwig_peft_plugin.training.out_of_memory import explanation

    text = explanation(config_obj, "training", "CUDA error: out of memory")
    assert text.splitlines()[0] == "The GPU ran out of memory while training."
