"""Soft prompts of every kind on the tiny Llama of the adapter tests, moved away from their start and trained."""

from __future__ import annotations

from typing import Any

import torch
from ludwig.schema.llms.peft import adapter_registry
from torch import Tensor

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)

TASK = {"task_column": "task", "num_tasks": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prefix_tuning", {}),
    "projected prefix": ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 24}),
    "prompt": ("prompt_tuning", {}),
    "mlp": ("p_tuning", {"encoder_hidden_size": 24}),
    "lstm": ("p_tuning", {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"}),
    "multitask": ("multitask_prompt_tuning", TASK),
    "cartridge": ("cartridge", {"num_frozen_tokens": 2}),
    "adaption": ("adaption_prompt", {"adapter_len": 4}),
}
NETWORKS = ("projected prefix", "mlp", "lstm")
COUNT = 6


def section(variant: str, **options: Any) -> Any:
    kind, given = VARIANTS[variant]
    size = {} if kind == "adaption_prompt" else {"num_virtual_tokens": COUNT}
    return adapter_registry[kind](**{**size, **given, **options})


@torch.no_grad()
def logits(tiny: Any, model: Any) -> Tensor:
    model.eval()
    tasks = {}
    if "MULTITASK" in str(model.peft_config["default"].peft_type):
        tasks["task_ids"] = torch.tensor([0, 1, 2, 1])
    found: Tensor = model(input_ids=tiny.ids, attention_mask=tiny.mask, **tasks).logits[:, -tiny.ids.shape[1] :]
    return found[tiny.mask.bool()]


def train(tiny: Any, model: Any, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = list(tiny.batches())
    multitask = "MULTITASK" in str(model.peft_config["default"].peft_type)
    tasks = {"task_ids": torch.tensor([0, 1, 2, 1])} if multitask else {}
    for step in range(steps):
        model(**batches[step % 2], **tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
