"""Everything that `ludwig-peft estimate` says about a config."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.estimate.batch import TOKENS, BatchPlan, batch_plan
from ludwig_peft_plugin.estimate.largest import TOKEN_STEP, largest
from ludwig_peft_plugin.estimate.memory import CUDA_CONTEXT, Estimate, Estimator
from ludwig_peft_plugin.estimate.suggest import Case, Memories, Suggestion, combination, suggestions


@dataclass(frozen=True)
class Report:
    """An estimate, how it compares with a GPU, and what could be changed.

    Attributes:
        base_model: the base's name in the config.
        plan: how micro-batches come about.
        size: rows or tokens of the micro-batch that was estimated.
        estimate: the memory with it.
        gpu: bytes of the GPU, None when none was given.
        largest: the largest batch that fits, in the plan's unit; 0 when none does, None without a GPU.
        suggestions: changes that lower the memory, the best first; only where it does not fit.
        together: the texts of the changes that fit when all are made, with the bytes needed then.
        adapters: the names of the adapters where there are several.
    """

    base_model: str
    plan: BatchPlan
    size: int
    estimate: Estimate
    gpu: int | None = None
    largest: int | None = None
    suggestions: list[Suggestion] = field(default_factory=list)
    together: tuple[list[str], int] | None = None
    adapters: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the batch fits into the GPU; None without one."""
        return None if self.gpu is None else self.estimate.needed <= self.gpu

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; sizes are bytes."""
        estimate = self.estimate
        return {
            "base_model": self.base_model,
            "adapters": list(self.adapters),
            "batch": {"unit": self.plan.unit, "size": self.size, **asdict(estimate.shape)},
            "parameters": asdict(estimate.parameters),
            "at_peak": estimate.at_peak,
            "peak": estimate.peak,
            "saved_for_backward": estimate.saved,
            "closed_formula_because": estimate.obstacle,
            "paged_optimiser_state": estimate.paged,
            "allocator_slack": estimate.slack,
            "cuda_context": CUDA_CONTEXT,
            "needed": estimate.needed,
            "gpu": self.gpu,
            "fits": self.fits,
            "largest_batch": self.largest,
            "suggestions": [
                {"change": entry.change.text, "cost": entry.change.cost, "saves": entry.saves, "needed": entry.needed}
                for entry in self.suggestions
            ],
            "together": None if self.together is None else {"changes": self.together[0], "needed": self.together[1]},
        }


def report(
    config_obj: Any, *, gpu: int | None = None, row_tokens: int | None = None, target_share: float = 1.0
) -> Report:
    """Return the report on a config.

    Args:
        config_obj: the validated config.
        gpu: bytes of GPU memory to compare with.
        row_tokens: tokens of the longest row of the data; by default rows reach the config's limit.
        target_share: the part of a row's tokens that carries loss.

    Raises:
        ModelError: the config trains nothing, is not of this plugin, or its memory cannot be estimated.
        AdapterError: the adapter cannot be attached as asked.
    """
    _check(config_obj)
    estimator = Estimator(config_obj)
    plan = batch_plan(config_obj, estimator.llm.model_config, row_tokens, target_share)
    step = TOKEN_STEP if plan.unit == TOKENS else 1
    most = None
    if gpu is not None:

        def needed(size: int) -> int:
            return estimator.estimate(plan.shape(size)).needed

        most = largest(needed, gpu, plan.size or 2 * step, step)
    size = plan.size or most or step
    estimate = estimator.estimate(plan.shape(size))
    section = getattr(config_obj, "adapters", None)
    names = () if section is None else (*section.adapters, *([section.merge.name] if section.merge else []))
    result = Report(config_obj.base_model, plan, size, estimate, gpu, most, adapters=names)
    if gpu is None or estimate.needed <= gpu:
        return result
    case, memories = Case(config_obj, plan, size), Memories(estimator)
    single = suggestions(case, memories.needed, gpu)
    chosen, total = combination(case, single, memories.needed, gpu)
    together = ([entry.change.text for entry in chosen], total) if len(chosen) > 1 and total <= gpu else None
    return replace(result, suggestions=single, together=together)


def _check(config_obj: Any) -> None:
    from ludwig_peft_plugin.data.preprocess import is_text_to_text

    if config_obj.trainer.type == "none":
        raise ModelError("trainer.type: none trains nothing; the estimate is one of training. Use type: finetune.")
    if not is_text_to_text(config_obj):
        raise ModelError("The estimate is for text answers: the first output feature has to be of type text.")


@contextmanager
def opened_config(path: Path, model_config: Path | None = None) -> Iterator[Any]:
    """Yield the validated config of a YAML file.

    Args:
        path: the YAML file.
        model_config: a config.json, or a folder with one, that describes the base in the place of `base_model`.

    Raises:
        ConfigValidationError: the config is wrong.
        ModelError: there is no such config.json.
    """
    from ludwig.schema.model_types.base import ModelConfig
    from ludwig.utils.data_utils import load_yaml

    raw = load_yaml(str(path))
    if model_config is None:
        yield ModelConfig.from_dict(raw)
        return
    source = model_config / "config.json" if model_config.is_dir() else model_config
    if not source.is_file():
        raise ModelError(f"--model-config: {str(model_config)!r} is no config.json and no folder with one.")
    with TemporaryDirectory() as parent:
        folder = Path(parent, str(raw.get("base_model", "base")).replace("/", "--"))
        folder.mkdir()
        shutil.copy(source, folder / "config.json")
        (folder / "model.safetensors").touch()  # a base without weights is refused; none are read here
        yield ModelConfig.from_dict({**raw, "base_model": str(folder)})
