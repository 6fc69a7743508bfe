"""`adapter: {type: adamss}`: small updates inside subspaces of each weight, found by clustering its decomposition."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import ABOVE_ZERO, SEED, SHARE, Values

if TYPE_CHECKING:
    from peft import PeftModel

    from ludwig_peft_plugin.adapters.step_hooks import StepHooks

OF_CHOICE = (
    "asa_target_subspaces",
    "init_warmup",
    "final_warmup",
    "mask_interval",
    "asa_importance_beta",
    "asa_uncertainty_beta",
    "asa_schedule_exponent",
)
"""Options of how subspaces are frozen while training."""


@peft_method("adamss")
class AdamssConfig(PeftMethod):
    r"""AdaMSS, adaptive multi-subspace fine-tuning (NeurIPS 2025, https://neurips.cc/virtual/2025/poster/119606).

    The singular value decomposition of W is cut to rank `r` and its outputs are clustered into `num_subspaces` groups.
    A layer computes `W x + S concat_k(B_k A_k) V x`: V of shape [r, in] is frozen and comes from the decomposition, A_k
    of shape [subspace_rank, r] and B_k of shape [group, subspace_rank] are trained, and S puts the groups' outputs in
    their places. B_k starts at zero, so the adapted model starts as the base.

    With `use_asa` the subspaces that matter least are frozen in the course of training, until
    `asa_target_subspaces` are left in the whole model. PEFT's defaults are kept.
    """

    paper: ClassVar[str] = "AdaMSS 2025, https://neurips.cc/virtual/2025/poster/119606"
    good_for: ClassVar[str] = "very few trained parameters, chosen by the structure of each weight"
    learning_rate: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str] = "ADAMSS"
    title: ClassVar[str] = "AdaMSS"
    summary: ClassVar[str] = (
        "Clusters each weight's singular vectors into subspaces and trains a small update in each of them."
    )
    removed: ClassVar[dict[str, str]] = {"init_weights": "has one value: A orthogonal and B at zero"}
    values: ClassVar[dict[str, Values]] = {
        "svd_threshold": SHARE,
        "asa_importance_beta": SHARE,
        "asa_uncertainty_beta": SHARE,
        "asa_schedule_exponent": ABOVE_ZERO,
        "random_seed": SEED,
    }
    texts: ClassVar[dict[str, str]] = {
        "r": "Singular vectors of a weight that are looked at; at most what the weight has.",
        "num_subspaces": "Subspaces of each layer.",
        "subspace_rank": "Rank of the update in each subspace; the largest one with `use_dynamic_rank`.",
        "use_dynamic_rank": "Whether a subspace's rank is the number of its singular values above `svd_threshold` "
        "times the largest one.",
        "svd_threshold": "See `use_dynamic_rank`.",
        "use_asa": "Whether the least important subspaces are frozen while training.",
        "asa_target_subspaces": "Subspaces of the whole model that are still trained after `final_warmup`.",
        "init_warmup": "Step from which on subspaces are frozen.",
        "final_warmup": "Step at which `asa_target_subspaces` is reached; at most the run's length.",
        "mask_interval": "Steps from one choice of subspaces to the next.",
        "asa_importance_beta": "Smoothing of a subspace's importance over steps.",
        "asa_uncertainty_beta": "Smoothing of how much that importance varies.",
        "asa_schedule_exponent": "How fast subspaces are frozen: 3 most of them early, 1 evenly.",
        "random_seed": "Seed of the decomposition and the clustering, which are made again when the adapter is loaded.",
    }

    def problems(self) -> list[str]:
        """Refuse options of a choice of subspaces, or of ranks, that is not made."""
        options: Any = self
        problems = super().problems()
        if not options.use_asa:
            problems += self.idle("use_asa: true", *OF_CHOICE)
        elif options.init_warmup >= options.final_warmup:
            problems.append(
                f"init_warmup: {options.init_warmup} is not below final_warmup: {options.final_warmup}, which leaves "
                "no step for freezing subspaces; lower it."
            )
        if not options.use_dynamic_rank:
            problems += self.idle("use_dynamic_rank: true", "svd_threshold")
        elif options.subspace_rank == 1:
            problems.append("use_dynamic_rank has no effect with subspace_rank: 1; give the largest rank there may be.")
        return problems

    def start_plainly(self) -> None:
        """Give every subspace its largest rank; how many singular values are large is seen in the weights alone."""
        options: Any = self
        options.use_dynamic_rank = False

    @classmethod
    @contextmanager
    def without_data(cls) -> Iterator[None]:
        """Cut the outputs of a layer into groups of one size, where the clusters of its weight cannot be found."""
        from peft.tuners.adamss import layer

        from ludwig_peft_plugin.estimate.replace import replaced

        with replaced(layer, {"slice_pca": _decomposition, "clustering_Z": _groups}):
            yield

    def step_hooks(self, model: "PeftModel", total_steps: int) -> "StepHooks | None":
        """Return what freezes subspaces while training, None without `use_asa`."""
        from ludwig_peft_plugin.adapters.adamss_steps import AdamssSteps

        options: Any = self
        return AdamssSteps(model, total_steps, options.final_warmup) if options.use_asa else None


def _decomposition(weight: Tensor, r: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Return empty singular vectors of a weight of shape (1, 1, out, in): (1, 1, r, in) and (1, 1, out, r)."""
    outputs, inputs = weight.shape[-2:]
    rank = min(r, outputs, inputs)
    return weight.new_empty(1, 1, rank, inputs), weight.new_empty(1, 1, outputs, rank)


def _groups(rows: Tensor, count: int, *_: Any) -> tuple[Tensor, int]:
    """Return the group of each row, shape (out,), and how many groups there are."""
    count = min(count, len(rows))
    return torch.arange(len(rows)) % count, count
