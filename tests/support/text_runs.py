"""A config of a text-to-text task, a trainer of it without data, and steps of this trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ludwig_peft_plugin.data.batches import StepBatch


def text_config(base_model: str = "tiny-llama-python", **sections: Any) -> Any:
    """Return the validated config of a task on `base_model`; `trainer` adds to fine-tuning with batches of two rows."""
    from ludwig.schema.model_types.base import ModelConfig

    trainer = {"type": "finetune", "batch_size": 2, **sections.pop("trainer", {})}
    return ModelConfig.from_dict(
        {
            "model_type": "llm",
            "base_model": base_model,
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "trainer": trainer,
            **sections,
        }
    )


def new_trainer(config_obj: Any, device: str = "cpu") -> Any:
    """Return the plugin's trainer of a new model, the same at each call, in training mode."""
    from ludwig_peft_plugin.model.llm import PeftLLM
    from ludwig_peft_plugin.training.trainer import PeftTrainer

    torch.manual_seed(0)
    llm = PeftLLM(config_obj, _device=device)
    trainer = PeftTrainer(config_obj.trainer, llm, device=device)
    llm.train()
    return trainer


def take_steps(trainer: Any, steps: Iterable[StepBatch]) -> list[float]:
    """Take an optimiser step with each batch, and return their losses."""
    return [float(trainer.train_step(step)[0]) for step in steps]
