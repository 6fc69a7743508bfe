"""Every adapter type through Ludwig on a toy Llama: a resumed run is the uninterrupted one, a loaded model the trained.

Weights and losses are compared bit by bit. The checkpoint lies in the middle of the epoch, and the step after it is
taken twice.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from killed_runs import KillAt, Killed
from ludwig.callbacks import Callback
from ludwig.schema.llms.peft import adapter_registry
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ludwig_peft_plugin.adapters  # noqa: F401  (registers the types)
from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.model.base_model import resolve_base_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch, by frod

STEPS, CHECKPOINT, KILLED = 5, 2, 3
SHORT = {"num_virtual_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_layers": 1},
    "cartridge": SHORT,
    "layers": {"last": 1},
    "multitask_prompt_tuning": {**SHORT, "task_column": "task", "num_tasks": 2},
    "p_tuning": SHORT,
    "prefix_tuning": SHORT,
    "prompt_tuning": SHORT,
    "vblora": {"vector_length": 16},
}
"""What a type needs on layers this small, beside its name."""
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "adamss, subspaces frozen": (
        "adamss",
        {
            "num_subspaces": 3,
            "use_asa": True,
            "asa_target_subspaces": 20,
            "init_warmup": 1,
            "final_warmup": 4,
            "mask_interval": 1,
        },
    ),
    "lora, pissa": ("lora", {"init_lora_weights": "pissa", "dropout": 0.1}),
    "lora, eva": ("lora", {"init_lora_weights": "eva", "r": 2}),
    "prefix_tuning, projected": ("prefix_tuning", {**SHORT, "prefix_projection": True, "encoder_hidden_size": 16}),
}
"""Variants that keep something of their own beside the adapter's weights."""
OURS = sorted(name for name, cls in adapter_registry.items() if issubclass(cls, AdapterConfig))
CASES = {**{name: (name, OPTIONS.get(name, {})) for name in OURS}, **MORE}


class Record(Callback):
    """Keeps the steps taken and the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.taken: list[int] = []

    def on_batch_end(self, trainer: Any, progress_tracker: Any, save_path: str, **kwargs: Any) -> None:
        self.losses = list(trainer.loss_curve)
        self.taken.append(progress_tracker.steps)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama with biases, which BitFit and BEFT need, and the shipped model's tokenizer."""
    folder = tmp_path_factory.mktemp("toy-llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_base_model("tiny-llama-python"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def few(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of five steps, and one to validate and test."""
    chosen = rows.groupby("split").head(2 * STEPS)
    chosen = pd.concat([chosen[chosen["split"] == 0], chosen[chosen["split"] != 0].groupby("split").head(1)])
    return chosen.assign(task=[index % 2 for index in range(len(chosen))]).reset_index(drop=True)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the trained parameters of a Ludwig model."""
    return {name: p.detach().cpu() for name, p in model.model.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: Any, task: torch.Tensor | None) -> torch.Tensor:
    """Return the logits of a fixed row."""
    model.model.model.eval()
    ids = torch.arange(5, 29, device=model.model.curr_device)[None]
    extra = {} if task is None else {"task_ids": task}
    result: torch.Tensor = model.model.model(input_ids=ids, **extra).logits.cpu()
    return result


def test_every_type_is_tried() -> None:
    assert len(OURS) >= 45
    assert OPTIONS.keys() <= set(OURS)


@pytest.mark.parametrize("case", CASES)
def test_resumed_and_loaded_are_the_same(
    case: str, toy: str, few: pd.DataFrame, make_config: Any, new_model: Any, tmp_path: Path
) -> None:
    from ludwig.api import LudwigModel

    kind, options = CASES[case]
    config = make_config(
        base_model=toy,
        adapter={"type": kind, **options},
        trainer={
            "type": "finetune",
            "epochs": 1,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "learning_rate_scheduler": {"decay": "linear", "warmup_fraction": 0.4},
            "steps_per_checkpoint": CHECKPOINT,
            "skip_all_evaluation": True,
        },
    )
    quiet = {"skip_save_processed_input": True, "skip_save_log": True}

    def train(*callbacks: Callback, **arguments: Any) -> Any:
        model = new_model(config)
        model.train(dataset=few, callbacks=list(callbacks), **arguments, **quiet)
        return model

    whole, cut, rest = Record(), Record(), Record()
    trained = train(whole, output_directory=str(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(cut, KillAt(KILLED), output_directory=str(tmp_path / "cut"))
    (run,) = (tmp_path / "cut").iterdir()
    resumed = train(rest, model_resume_path=str(run))

    assert whole.taken == [step for step, _ in whole.losses] == list(range(1, STEPS + 1))
    assert rest.taken == list(range(CHECKPOINT + 1, STEPS + 1))
    assert cut.losses == whole.losses[:KILLED]
    assert rest.losses == whole.losses
    expected, found = weights(trained), weights(resumed)
    assert expected
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    (whole_run,) = (tmp_path / "whole").iterdir()
    loaded = LudwigModel.load(str(whole_run / "model"), logging_level=logging.ERROR)
    task = torch.tensor([1]) if kind == "multitask_prompt_tuning" else None
    wanted = logits(trained, task)
    assert torch.equal(logits(loaded, task), wanted)
    assert torch.equal(logits(resumed, task), wanted)
