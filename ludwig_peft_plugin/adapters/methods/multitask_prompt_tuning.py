"""`adapter: {type: multitask_prompt_tuning}`: a prompt for each task, of which a part is shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.fields import option
from ludwig_peft_plugin.adapters.soft_prompt_start import embeddings_of, encoder_of
from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt, soft_prompt
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SOURCES = ("average_source_tasks", "exact_source_task", "only_source_shared")
"""Values of `init` that start from an adapter of the same kind."""


@soft_prompt("multitask_prompt_tuning")
class MultitaskPromptTuningConfig(SoftPrompt):
    """Multitask prompt tuning, Wang et al. 2023 (https://arxiv.org/abs/2303.02861).

    Rows of task k read `P * (u_k v_k)` before them: P is a prompt of shape [P, hidden] that all tasks share, and the
    element-wise factor is the product of u_k, [P, ranks], and v_k, [ranks, hidden]. A column of the dataset says which
    task a row belongs to, in training and in prediction.

    PEFT draws u and v with a standard deviation of 0.02, so that every prompt starts as nearly zero. Here their first
    ranks start as ones: each task's prompt starts as the shared one, which starts as tokens of the vocabulary. From a
    trained adapter (`source`) the shared prompt is taken, with the mean of its tasks' factors or with those of one.
    Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Wang et al. 2023, https://arxiv.org/abs/2303.02861"
    good_for: ClassVar[str] = "several related tasks in one dataset, or a new task after them"
    learning_rate: ClassVar[float | None] = 3e-2

    several: ClassVar[bool] = False

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    title: ClassVar[str] = "Multitask prompt tuning"
    summary: ClassVar[str] = (
        "Trains embeddings that stand before every row: one prompt that all tasks share, times a factor of low rank "
        "for each task. The base stays as it is."
    )
    renamed: ClassVar[dict[str, str]] = {
        "prompt_tuning_init_state_dict_path": "source",
        "prompt_tuning_init_task": "source_task",
    }
    defaults: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 32, "num_tasks": 2}
    texts: ClassVar[dict[str, str]] = {
        "num_tasks": "How many tasks there are.",
        "num_ranks": "Rank of the factor that makes a task's prompt of the shared one.",
        "source": "A trained adapter of this type (a folder or hub id) to start from.",
        "source_task": "The task of `source` to start from, with `init: exact_source_task`.",
    }

    task_column: str | None = schema_utils.String(
        default=None,
        allow_none=True,
        description="The column of the dataset that says which task a row belongs to: a number from 0 to one less than "
        "`num_tasks`, or one of `tasks`. Required.",
    )
    tasks: list[str] | None = option(
        {"anyOf": [{"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "null"}]},
        "a list of texts",
        "What the tasks are called in `task_column`, in the order of their numbers. Null takes numbers.",
    )
    init: str = schema_utils.StringOptions(
        options=["sample_vocab", "text", "data", "random", *SOURCES],
        default="sample_vocab",
        description="How the shared prompt starts: as random tokens of the vocabulary, as those of `init_text`, as the "
        "first tokens of training rows (`data`), at random, or from `source`: with the mean of its tasks' factors, "
        "with those of `source_task`, or with new ones.",
    )
    init_text: str | None = schema_utils.String(
        default=None, allow_none=True, description="The text for `init: text`, repeated or cut to the prompt's length."
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the options, whatever the base; each begins with the option's name."""
        problems = super().problems()
        options: Any = self
        if self.task_column is None:
            problems.append("task_column is missing: the column of the dataset that says which task a row belongs to.")
        if self.tasks is not None and len(set(self.tasks)) != options.num_tasks:
            problems.append(f"tasks must name {options.num_tasks} different tasks, as num_tasks says.")
        if (self.init in SOURCES) != (options.source is not None):
            how = " or ".join((", ".join(SOURCES[:-1]), SOURCES[-1]))
            problems.append(f"source and init belong together: name an adapter in source, with init: {how}.")
        if options.source_task and self.init != "exact_source_task":
            problems.append("source_task has no effect without init: exact_source_task; add that, or remove it.")
        return problems

    def sharing_obstacle(self) -> str | None:
        """Return why this adapter cannot be on one base with others."""
        return f"adapter type `{self.type}` cannot share a base with others, which know no tasks; train it alone"

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of the PEFT config; where weights start is none of them."""
        arguments = super().peft_arguments()
        return {name: value for name, value in arguments.items() if name not in self.renamed}

    def begin(self, model: PeftModel, base: PreTrainedModel, tokens: Tensor | None) -> None:
        """Set the shared prompt and the tasks' factors; see `SoftPrompt.begin`."""
        encoder = encoder_of(model)
        with torch.no_grad():
            encoder.prefix_task_cols[:, :, 0] = 1
            encoder.prefix_task_rows[:, 0] = 1
            if tokens is not None:
                encoder.embedding.weight.copy_(embeddings_of(base, tokens))
            elif self.init in SOURCES:
                self._take_over(encoder)

    def _take_over(self, encoder: Any) -> None:
        """Copy the parts of the trained adapter `source` that `init` asks for."""
        from ludwig_peft_plugin.adapters.source import read_adapter

        options: Any = self
        state = read_adapter(options.source).state
        parts = {"prompt_embeddings": encoder.embedding.weight}
        if self.init != "only_source_shared":
            parts |= {"prefix_task_cols": encoder.prefix_task_cols, "prefix_task_rows": encoder.prefix_task_rows}
        for name, mine in parts.items():
            theirs = state.get(name)
            if theirs is None:
                raise AdapterError(f"adapter.source: {options.source!r} is no multitask_prompt_tuning adapter.")
            if mine.dim() == 3:
                task = options.source_task
                if self.init == "exact_source_task" and task >= len(theirs):
                    raise AdapterError(
                        f"adapter.source_task: {task}, but {options.source!r} has the tasks 0 to {len(theirs) - 1}."
                    )
                theirs = theirs[task] if self.init == "exact_source_task" else theirs.mean(dim=0)
            if theirs.shape[-2:] != mine.shape[-2:]:
                raise AdapterError(
                    f"adapter.source: {name} of {options.source!r} has the shape {list(theirs.shape)}, and here "
                    f"{list(mine.shape[-2:])}; num_virtual_tokens, num_ranks and the base's width must be the same."
                )
            mine.copy_(theirs)
