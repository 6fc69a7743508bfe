"""`adapter: {type: frod}`: weights of one kind decomposed over one basis, and its coefficients trained."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.base import Batches
from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import SHARE, Values

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


@peft_method("frod")
class FrodConfig(PeftMethod):
    r"""FRoD, 2026 (https://doi.org/10.1609/aaai.v40i31.39813).

    The weights of one kind (all `q_proj`, ...) are decomposed together: `W = U diag(l) V^T` with one basis V of shape
    [in, in] for all layers and columns of norm 1 in U. A layer computes `U (diag(l) + S) V^T x`, with l of shape [in]
    and S sparse (a share `sparse_rate` of the entries off the diagonal, at places drawn once) trained. l starts as
    decomposed and S at zero, so the adapted model starts as the base, up to the rounding of the decomposition.

    Each layer keeps U in full precision, so a quantised base would save nothing and is refused. The decomposition takes
    time with each loading. PEFT's defaults are kept.
    """

    paper: ClassVar[str] = "FRoD 2026, https://doi.org/10.1609/aaai.v40i31.39813"
    good_for: ClassVar[str] = "full-rank changes from few numbers, where memory is no concern"
    learning_rate: ClassVar[float | None] = 5e-3
    quantized_base: ClassVar[bool] = False
    quantized_reason: ClassVar[str] = "it keeps a factor of every weight in full precision, so quantising saves nothing"
    peft_type: ClassVar[str] = "FROD"
    title: ClassVar[str] = "FRoD"
    summary: ClassVar[str] = "Decomposes the weights of one kind over a common basis and trains the coefficients."
    removed: ClassVar[dict[str, str]] = {
        "progressbar": "the log says what is done",
        "runtime_offload_base_weight": "moves weights of the base while it runs, behind the back of checkpoints",
    }
    values: ClassVar[dict[str, Values]] = {"sparse_rate": SHARE}
    texts: ClassVar[dict[str, str]] = {
        "sparse_rate": "Share of the entries off the diagonal that are trained.",
        "regularization_alpha": "Added to the diagonal where the basis is computed, for weights that are alike.",
        "projection_prng_key": "Seed of the places of the sparse entries.",
        "frod_dropout": "Dropout on the input of the layer while training.",
    }

    def build(self, base: "PreTrainedModel", batches: Batches | None) -> "PeftModel":
        """Put a new adapter on `base`; see `AdapterConfig.build`."""
        from torch.sparse import check_sparse_tensor_invariants

        check_sparse_tensor_invariants.disable()  # as they are anyway; said out loud, PyTorch warns of it no longer
        return super().build(base, batches)

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftConfig":
        """Return the PEFT config, without a progress bar."""
        return super().to_config(task_type, **{**kwargs, "progressbar": False})
