"""What the adapters of a model's encoders do in each optimiser step, as one (see `adapters.step_hooks`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ludwig_peft_plugin.adapters.step_hooks import StepHooks
from ludwig_peft_plugin.encoders.adapted import adapted_encoders
from ludwig_peft_plugin.errors import AdapterError, CheckpointError


def optimizer_steps(batches: int, per_epoch: int, accumulation: int, per_checkpoint: int) -> int:
    """Return how many optimiser steps Ludwig takes over a number of batches, which it calls steps.

    Gradients are applied every `accumulation` batches of an epoch and before each checkpoint; what an epoch has left
    over is lost.
    """
    return sum(
        1
        for batch in range(batches)
        if (batch % per_epoch + 1) % accumulation == 0 or (batch + 1) % per_checkpoint == 0
    )


class EncoderSteps:
    """The step hooks of all encoders, and how many optimiser steps were taken.

    Attributes:
        hooks: by the name of the input feature whose encoder has them.
    """

    def __init__(self, model: Any, total_steps: int) -> None:
        """Collect the hooks of a model's encoders for a run of `total_steps` optimiser steps.

        Raises:
            AdapterError: an adapter's options do not fit a run of this length.
        """
        self.hooks: dict[str, StepHooks] = {}
        self._taken = 0
        for name, adapter, adapted in adapted_encoders(model):
            try:
                hooks = adapter.step_hooks(adapted, total_steps) if hasattr(adapter, "step_hooks") else None
            except AdapterError as error:
                raise AdapterError(f"input feature {name!r}: {error}") from error
            if hooks is not None:
                self.hooks[name] = hooks

    def loss_term(self) -> Tensor | None:
        """Return what is added to the loss of an optimiser step (scalar, with gradient), None for nothing."""
        terms = [term for hooks in self.hooks.values() if (term := hooks.loss_term()) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def after_step(self) -> None:
        """Act on the adapters after an optimiser step, while gradients are still there."""
        self._taken += 1
        for hooks in self.hooks.values():
            hooks.after_step(self._taken)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, and values of plain types."""
        return {"taken": self._taken, "hooks": {name: hooks.state() for name, hooks in self.hooks.items()}}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: there is nothing for one of the adapters.
        """
        saved = state["hooks"] if state else {}
        if missing := sorted(self.hooks.keys() - saved.keys()):
            raise CheckpointError(
                f"The checkpoint does not hold what the adapter of input feature {missing[0]!r} keeps between steps, "
                "so this run cannot be resumed; start a new one."
            )
        self._taken = state["taken"] if state else 0
        for name, hooks in self.hooks.items():
            hooks.restore(*saved[name])
