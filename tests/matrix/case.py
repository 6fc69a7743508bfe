"""One cell of the matrix: an adapter type on a base, and what is done with it in the checks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from disturbed import disturbed
from ludwig.schema.llms.peft import adapter_registry
from torch import Tensor

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.data.batches import MicroBatch, collate
from ludwig_peft_plugin.training.loss import target_loss


@dataclass
class Case:
    """An adapter type on a base.

    Attributes:
        kind: name of the type.
        base_name: name of the base.
        expected: what `expected.py` says about the type.
        precision: how the base is stored.
        bases: makes bases.
        make_run: makes a training run of a case and a model.
    """

    kind: str
    base_name: str
    expected: Any
    precision: Any
    bases: Any
    make_run: Any

    def run(self, model: Any, **options: Any) -> Any:
        """Return a training run of a model, whose adapter has these options beside those of the type."""
        return self.make_run(self, model, **options)

    @property
    def cls(self) -> Any:
        """The type's config class."""
        return adapter_registry[self.kind]

    @property
    def tolerance(self) -> float:
        """How far two ways to the same number may differ, relative to the largest."""
        return float(self.precision.tolerance)

    @property
    def trains_base(self) -> bool:
        """Whether the type trains the base's own weights instead of adding some."""
        return bool(getattr(self.cls, "trains_base", False))

    def section(self, **options: Any) -> Any:
        """Return the type's config object."""
        return self.cls(**{**self.options, **options})

    @property
    def options(self) -> dict[str, Any]:
        """The options that make the type fit the base."""
        return {**self.expected.options, **self.expected.on.get(self.base_name, {})}

    @property
    def texts(self) -> Any:
        """What the base reads: rows, prompts and the token that ends an answer."""
        return self.bases.texts(self.base_name)

    def base(self) -> Any:
        """Return a new base."""
        return self.bases.new(self.base_name)

    def attach(self, base: Any = None, seed: int = 7, **options: Any) -> Any:
        """Return a new base (or the given one) with a new adapter, in evaluation mode."""
        base = self.base() if base is None else base
        adapter = self.section(**options)
        torch.manual_seed(seed)
        return attach_adapter(base, adapter, batches=lambda: iter([self.rows().padded()])).eval()

    @cached_property
    def base_of_model(self) -> Any:
        """The base that `model` was made of, which it is part of."""
        return self.base()

    @cached_property
    def tensors_of_base(self) -> list[Tensor]:
        """The tensors the base of `model` had before there was an adapter."""
        return [*self.base_of_model.parameters(), *self.base_of_model.buffers()]

    @cached_property
    def model(self) -> Any:
        """A model whose adapter is no longer as it started; checks leave its parameters as they are."""
        assert self.tensors_of_base
        return self.disturbed(self.attach(self.base_of_model))

    def attach_disturbed(self) -> Any:
        """Return a new model like `model`."""
        return self.disturbed(self.attach())

    def disturbed(self, model: Any) -> Any:
        """Return `model` with noise, always the same, on every parameter that is trained."""
        return disturbed(model, self.spread)

    @property
    def spread(self) -> float:
        """Standard deviation of the noise that makes parameters differ from how they start."""
        on_shipped = self.expected.spread_shipped if self.base_name.startswith("shipped") else None
        return float(self.expected.spread if on_shipped is None else on_shipped)

    @staticmethod
    def trained(model: Any) -> dict[str, Any]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    @staticmethod
    def made_tokens(model: Any) -> int:
        """Return how many numbers the virtual tokens of a soft prompt are, 0 for other types."""
        config = getattr(model, "peft_config", {}).get("default")
        if config is None or not config.is_prompt_learning:
            return 0
        return int(model.get_prompt_embedding_to_save("default").numel())

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Return the logits of all rows, padded on the right; zero at padding, which no one reads."""
        model.eval()
        batch = self.rows().padded()
        del batch["labels"]
        mask = batch["attention_mask"]
        found: Tensor = self.called(model, **batch).logits[:, -mask.shape[1] :]
        return found.masked_fill(mask[..., None] == 0, 0)

    def tasks_of_answers(self) -> dict[str, Any]:
        """Return the argument of generation that says which task each prompt belongs to, where there are tasks."""
        tasks = self.rows().tasks
        return {} if tasks is None else {"tasks": tasks}

    def called(self, model: Any, **batch: Tensor) -> Any:
        """Return what a model makes of a batch; without an adapter there are no tasks."""
        if not hasattr(model, "peft_config"):
            batch.pop("task_ids", None)
        return model(**batch)

    def flat(self, number: int = 0) -> MicroBatch:
        """Return a set of rows one after another, without padding."""
        rows = self.rows(number)
        return collate(rows, rows.numbers)

    def rows(self, number: int = 0) -> Any:
        """Return a set of rows, which belong to tasks where the type asks for some."""
        rows = copy.copy(self.texts.rows[number])
        if "task_column" in self.cls.model_fields:
            rows.tasks = rows.numbers % 2
        return rows

    def flat_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the rows without padding, as the trainer computes it, and every gradient it gives."""
        model.zero_grad()
        batch = self.flat()
        loss = target_loss(model, batch).loss_sum / batch.target_tokens
        loss.backward()
        return loss.detach(), self.gradients(model)

    def reference_gradients(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same by the model's own forward pass, one row at a time."""
        model.zero_grad()
        rows = self.rows()
        total = torch.zeros(())
        tokens = sum(rows.alone(row)[1] for row in rows.numbers)
        for row in rows.numbers:
            batch, count = rows.alone(row)
            total = total + self.called(model, **batch).loss * count / tokens
        total.backward()
        return total.detach(), self.gradients(model)

    @staticmethod
    def gradients(model: Any) -> dict[str, Tensor]:
        """Return every gradient there is, by the parameter's name."""
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def assert_close(self, found: Tensor, wanted: Tensor, what: str = "", tolerance: float | None = None) -> None:
        """Assert that tensors are equal up to the base's tolerance, relative to the largest number."""
        limit = (self.tolerance if tolerance is None else tolerance) * max(float(wanted.abs().max()), 1e-12)
        error = float((found - wanted).abs().max())
        assert error <= limit, f"{what}: differs by {error:.2e}, at most {limit:.2e} is rounding"
