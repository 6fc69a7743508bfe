"""What AdaMSS does in each optimiser step with `use_asa`: subspaces that matter least stop being trained."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adamss.layer import AdamssLayer
from torch import Tensor, nn

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.step_hooks import StepHooks
from ludwig_peft_plugin.errors import AdapterError

AVERAGES = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


class AdamssSteps(StepHooks):
    """Drives PEFT's adaptive subspace allocation.

    PEFT freezes a subspace by `requires_grad`, which the optimiser and the checkpoints of a run would have to follow.
    Here it stays a trained parameter that is put back to its value after each step.
    """

    def __init__(self, model: PeftModel, total_steps: int, final_warmup: int) -> None:
        if final_warmup > total_steps:
            raise AdapterError(
                f"adapter.final_warmup: {final_warmup} is past the {total_steps} steps of the run, so asa_target_"
                "subspaces would never be reached; lower it (and init_warmup and mask_interval with it)."
            )
        self._tuner: Any = model.base_model
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, AdamssLayer)}
        self._frozen: dict[str, Tensor] = {}

    def after_step(self, step: int) -> None:
        """Undo the step in frozen subspaces, update importances and freeze more when it is time."""
        parameters = self._parameters()
        with torch.no_grad():
            for name, value in self._frozen.items():
                parameters[name].copy_(value)
                parameters[name].grad = None  # PEFT scores what has a gradient
        self._tuner.update_and_allocate(step)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                self._frozen[name] = parameter.detach().clone()
                parameter.requires_grad_(True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the importance averages and the frozen subspaces' values."""
        tensors = {f"frozen/{name}": value for name, value in self._frozen.items()}
        for name, layer in self._layers.items():
            for kind in AVERAGES:
                for index, average in enumerate(getattr(layer, kind)[ADAPTER_NAME]):
                    if average is not None:
                        tensors[f"{kind}/{index}/{name}"] = average
        return tensors, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue with saved averages and frozen subspaces."""
        parameters = self._parameters()
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "frozen":
                self._frozen[rest] = tensor.to(parameters[rest].device)
            else:
                index, _, name = rest.partition("/")
                layer: Any = self._layers[name]
                device = layer.adamss_A[ADAPTER_NAME][int(index)].device
                getattr(layer, kind)[ADAPTER_NAME][int(index)] = tensor.to(device)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the two matrices of every subspace by name."""
        result = {}
        for name, layer in self._layers.items():
            for part in ("adamss_A", "adamss_B"):
                for index, parameter in enumerate(getattr(layer, part)[ADAPTER_NAME]):
                    result[f"{name}.{part}.{index}"] = parameter
        return result
