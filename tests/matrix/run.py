"""A training run of a cell: the trainer's step without the trainer, which takes a second and not a minute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from ludwig.distributed.base import LocalStrategy
from torch import Tensor

from ludwig_peft_plugin.training.checkpoint import TrainingCheckpoint
from ludwig_peft_plugin.training.loss import target_loss

LEARNING_RATE = 1e-2  # large enough to see what a step does
TOTAL_STEPS = 20


class Run:
    """The model of a case in training.

    Attributes:
        model: it.
    """

    def __init__(self, case: Any, model: Any, **options: Any) -> None:
        self.model = model
        self._case = case
        parameters = list(case.trained(model).values())
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        make_hooks = getattr(case.section(**options), "step_hooks", None)
        self._hooks = make_hooks(model, TOTAL_STEPS) if make_hooks else None
        self._checkpoint = TrainingCheckpoint(LocalStrategy(), model, self._optimizer)
        self._of_hooks: Any = None

    def steps(self, numbers: range) -> Iterator[dict[str, Tensor]]:
        """Take the steps of these numbers, from 0, in training mode; yield the gradients of each before it is taken.

        Dropout of a step depends on its number alone, so that a run can be continued.
        """
        self.model.train()
        for number in numbers:
            torch.manual_seed(100 + number)
            batch = self._case.flat(number % 2)
            self._optimizer.zero_grad()
            loss = target_loss(self.model, batch).loss_sum / batch.target_tokens
            if self._hooks is not None and (term := self._hooks.loss_term()) is not None:
                loss = loss + term
            loss.backward()
            yield self._case.gradients(self.model)
            self._optimizer.step()
            if self._hooks is not None:
                self._hooks.after_step(number + 1)
        self.model.eval()

    def train(self, numbers: range) -> None:
        """Take the steps of these numbers."""
        for _ in self.steps(numbers):
            pass

    def save(self, path: str) -> None:
        """Write a checkpoint."""
        self._checkpoint.save(path, 0)
        self._of_hooks = None if self._hooks is None else copy.deepcopy(self._hooks.state())

    def continue_from(self, other: Run, path: str) -> None:
        """Continue where another run was when it wrote a checkpoint."""
        self._checkpoint.load(path)
        if self._hooks is not None:
            self._hooks.restore(*other._of_hooks)
