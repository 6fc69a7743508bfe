"""`adapter: {type: dora}`: LoRA that trains a weight's magnitude apart from its direction."""

from typing import Any, ClassVar

from ludwig.schema import utils as schema_utils

from ludwig_peft_plugin.adapters.base import register
from ludwig_peft_plugin.adapters.lora_options import LoraOptions, target_modules_option


@register("dora")
class DoraConfig(LoraOptions):
    """Weight-decomposed low-rank adaptation, Liu et al. 2024 (https://arxiv.org/abs/2402.09353).

    A layer computes `m (W + s B A) x / |W + s B A|`, where `|.|` is the norm of each row (shape [out]) and m, of the
    same shape, is trained beside A and B; m starts at `|W|`, so the adapted model starts as the base.

    The paper adapts the query, key, value, up and down projections with ranks 16 and 32, alpha `2 * r` and dropout
    0.05; here it is rank 16 on all linear layers, which has a name in every architecture. Works on 4- and 8-bit bases.
    """

    paper: ClassVar[str] = "Liu et al. 2024, https://arxiv.org/abs/2402.09353"
    good_for: ClassVar[str] = "quality at low ranks, where slower steps do not matter"

    type: str = schema_utils.ProtectedString("dora", description="Weight-decomposed low-rank adaptation (DoRA).")
    r: int = schema_utils.PositiveInteger(default=16, description="Rank of the update.")
    target_modules: list[str] | str | None = target_modules_option(default="all-linear")

    ephemeral_gpu_offload: bool = schema_utils.Boolean(
        default=False,
        description="Whether the initial norms of layers that lie in CPU memory are computed on the GPU, which is "
        "faster and needs some of its memory for a moment. Needs a GPU.",
    )

    @property
    def uses_dora(self) -> bool:
        """Whether weights are decomposed into magnitude and direction."""
        return True

    @classmethod
    def name(cls) -> str:
        """Return the name shown to users."""
        return "DoRA"

    @classmethod
    def description(cls) -> str:
        """Return what the adapter does, in a few sentences."""
        return (
            "Trains a low-rank update of the direction of weights and their magnitude apart: better than LoRA at low "
            "ranks, slower while training, no cost at inference once merged."
        )

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`, by PEFT's names."""
        from peft import LoraRuntimeConfig

        runtime = LoraRuntimeConfig(ephemeral_gpu_offload=self.ephemeral_gpu_offload)
        return super().peft_arguments() | {"use_dora": True, "runtime_config": runtime}
