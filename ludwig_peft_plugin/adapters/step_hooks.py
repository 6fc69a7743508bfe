"""What an adapter does beside gradient steps: a term of the loss, and changes of itself after each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class StepHooks:
    """Called by the trainer once per optimiser step. A method that needs this returns one from `step_hooks`.

    Nothing here is called for other methods, so they wait for nothing.
    """

    def loss_term(self) -> Tensor | None:
        """Return what is added to the mean loss of a step (scalar, with gradient), None for nothing.

        It does not depend on the batch, and is not part of the loss that is logged.
        """
        return None

    def after_step(self, step: int) -> None:
        """Act on the model after optimiser step `step`, counted from 1, while gradients are still there."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a resumed run needs: tensors by name, and JSON values."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
