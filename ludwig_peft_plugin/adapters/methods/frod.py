"""`adapter: {type: frod}`: weights of one kind decomposed over one basis, and its coefficients trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

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
    learning_rate: ClassVar[float | None] = 1e-3
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
        # As they are anyway; said out loud, PyTorch warns of it no longer.
        torch.sparse.check_sparse_tensor_invariants.disable()
        return super().build(base, batches)

    @classmethod
    def settle(cls, model: "PeftModel") -> None:
        """Put U, V and the places of S beside the weights; PEFT leaves them on the host and copies them each step."""
        tuner: Any = model.base_model
        layers = [module for module in model.modules() if isinstance(module, tuner.tuner_layer_cls)]
        device = layers[0].get_base_layer().weight.device
        for layer in layers:
            for name in list(layer.frod_U):
                layer.frod_U[name] = layer.frod_U[name].to(device)
        for store in (tuner.frod_V, tuner.frod_s_indices, tuner.frod_s_size):
            for entries in store.values():
                first = next(iter(entries.values()))  # of which PEFT gives each further adapter a copy
                kept = first if store is tuner.frod_s_size else first.to(device)  # sizes are read on the host
                for name in list(entries):
                    entries[name] = kept

    @classmethod
    @contextmanager
    def without_data(cls) -> Iterator[None]:
        """Leave out the decomposition, and multiply by S as a dense matrix, which a GPU does in 16 bits."""
        from peft.tuners.frod import layer, model

        from ludwig_peft_plugin.estimate.replace import replaced

        with (
            replaced(model.FrodModel, {"_init_frod_projections": _projections(model)}),
            replaced(layer.FrodLayer, {"_calculate_frod_u_and_lambda": _factors}),
            replaced(layer.Linear, {"_get_frod_tensors": _tensors, "_sparse_activation_mm": _sparse_product}),
        ):
            yield

    def to_config(self, task_type: str | None = None, **kwargs: Any) -> "PeftConfig":
        """Return the PEFT config, without a progress bar."""
        return super().to_config(task_type, **{**kwargs, "progressbar": False})


def _projections(frod: Any) -> Callable[..., None]:
    """Return PEFT's method that makes V and draws the places of S, with all of it on the meta device.

    Args:
        frod: PEFT's module of the method.
    """
    from torch.fx.experimental import _config as settings

    from ludwig_peft_plugin.estimate.replace import replaced

    original = frod.FrodModel._init_frod_projections

    def basis(weights: list[Tensor], alpha: float) -> Tensor:
        return weights[0].new_empty(weights[0].shape[1], weights[0].shape[1])

    def made(tuner: Any, config: Any, name: str) -> None:
        every_place: Any = settings.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with torch.device("meta"), every_place, replaced(frod, {"_projection_from_weights": basis}):
            original(tuner, config, name)

    return made


def _factors(layer: Any, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty U of the shape of the weight, (out, in), and l, (in,)."""
    return weight.new_empty(weight.shape, dtype=torch.float32), weight.new_empty(len(v), dtype=torch.float32)


def _tensors(layer: Any, name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return U, V, S and l of a layer on the meta device, as its forward pass takes them."""
    from ludwig_peft_plugin.estimate.sparse import empty_sparse

    u, v = layer.frod_U[name].to(dtype), layer.frod_V[name].to(dtype)
    values = layer.frod_lambda_s_values[name].to(dtype)
    s = empty_sparse(values, layer.frod_s_indices[name], (len(v), len(v)))
    return u, v, s, layer.frod_lambda_l[name].to(dtype)


def _sparse_product(layer: Any, z: Tensor, s: Tensor) -> Tensor:
    """Return z S^T, shape (tokens, in)."""
    return z @ s.contiguous().t()
