"""What AdaLoRA does in each optimiser step: a term that keeps components apart, and ranks taken away by importance."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.step_hooks import StepHooks
from ludwig_peft_plugin.errors import AdapterError

STOCK_TOTAL = 10_000
"""Ludwig's default of total_step, which says nothing about a run."""
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoraSteps(StepHooks):
    """Drives PEFT's rank allocation over a run of known length.

    The rank pattern is kept here and not in the adapter's config, where PEFT would cut the saved matrices down by it:
    components that were switched off are zeros in e, so a folder is exact and training can go on from it.
    """

    def __init__(
        self,
        model: PeftModel,
        total_steps: int,
        *,
        tinit: int | None = None,
        tfinal: int | None = None,
        stated_total: int | None = None,
    ) -> None:
        if stated_total not in (None, STOCK_TOTAL, total_steps):
            raise AdapterError(
                f"adapter.total_step: {stated_total}, but the run has {total_steps} steps; leave total_step out."
            )
        first = total_steps // 10 if tinit is None else tinit
        last = total_steps // 3 if tfinal is None else tfinal
        if first + last >= total_steps:
            raise AdapterError(
                f"adapter: tinit: {first} and tfinal: {last} leave no step of {total_steps} for taking ranks away; "
                "lower them, or leave them out."
            )
        self._tuner: Any = model.base_model
        self._config: Any = model.peft_config[ADAPTER_NAME]
        self._config.tinit, self._config.tfinal, self._config.total_step = first, last, total_steps
        self._pattern: dict[str, list[bool]] | None = None
        self._factors = [
            (parameter, ".lora_A." in name)
            for name, parameter in model.named_parameters()
            if name.endswith((f".lora_A.{ADAPTER_NAME}", f".lora_B.{ADAPTER_NAME}"))
        ]

    def loss_term(self) -> Tensor | None:
        """Return `orth_reg_weight` times the mean of |A A^T - I| and |B^T B - I|, scalar."""
        if not self._config.orth_reg_weight or not self._factors:
            return None
        distances = []
        for factor, wide in self._factors:
            gram = factor @ factor.T if wide else factor.T @ factor
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        mean: Tensor = self._config.orth_reg_weight * torch.stack(distances).mean()
        return mean

    def after_step(self, step: int) -> None:
        """Update the importances and, when it is time, switch off the least important components."""
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(step)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the importance averages by parameter, and the rank pattern."""
        allocator = self._tuner.rankallocator
        tensors = {f"{kind}/{name}": tensor for kind in AVERAGES for name, tensor in getattr(allocator, kind).items()}
        return tensors, {"rank_pattern": self._pattern}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue with saved averages and rank pattern."""
        allocator, device = self._tuner.rankallocator, self._factors[0][0].device
        allocator.reset_ipt()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            getattr(allocator, kind)[name] = tensor.to(device)
            allocator.ipt[name] = torch.zeros_like(tensor, device=device)  # computed anew in each step
        self._pattern = values["rank_pattern"]
