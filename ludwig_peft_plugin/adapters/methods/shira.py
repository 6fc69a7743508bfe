"""`adapter: {type: shira}`: some entries of each weight, chosen at random."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import POSITIVE, SEED, Values
from ludwig_peft_plugin.adapters.shapes import Shapes
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 32


@peft_method("shira")
class ShiraConfig(PeftMethod):
    r"""SHiRA, Bhardwaj et al. 2024 (https://arxiv.org/abs/2406.13175).

    A layer computes `(W + S) x`, where S has `r (in + out)` trained entries, as many as LoRA of rank r, at places drawn
    once, and zeros elsewhere. Entries start at zero, so the adapted model starts as the base. The update has full rank
    and changes few entries of a weight.

    The adapter's file holds the entries and not their places, which are drawn again from `random_seed`; PEFT has no
    seed by default, and such an adapter cannot be loaded.
    """

    paper: ClassVar[str] = "Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175"
    good_for: ClassVar[str] = "adapters that are switched or added up, as they hardly overlap"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "SHIRA"
    title: ClassVar[str] = "SHiRA"
    summary: ClassVar[str] = "Trains a sparse set of entries of each weight, chosen at random."
    removed: ClassVar[dict[str, str]] = {"mask_type": "has one value: random"}
    defaults: ClassVar[dict[str, Any]] = {"r": None, "random_seed": 0}
    values: ClassVar[dict[str, Values]] = {"r": POSITIVE, "random_seed": SEED}
    texts: ClassVar[dict[str, str]] = {
        "r": "Gives the number of entries, `r (in + out)` per layer. Null is 32, or less where that would be more than "
        "half of the smallest layer.",
        "random_seed": "Seed of the places.",
    }

    @classmethod
    def building(cls) -> AbstractContextManager[None]:
        """Say that sparse matrices are not checked, which is so anyway and which torch otherwise warns of."""
        if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
            torch.sparse.check_sparse_tensor_invariants.disable()
        return nullcontext()

    @classmethod
    @contextmanager
    def without_data(cls) -> Iterator[None]:
        """Leave out the draw of the places, and add up sparse matrices without data."""
        from peft.tuners.shira import config, layer

        from ludwig_peft_plugin.estimate.replace import replaced

        update = layer.ShiraLayer.update_layer

        def placed(self: Any, adapter_name: str, mask: None, r: int, *arguments: Any, **options: Any) -> None:
            update(self, adapter_name, mask, r, *arguments, **options)
            entries = r * (self.in_features + self.out_features)
            self.shira_indices[adapter_name] = torch.empty(2, entries, dtype=torch.int32, device="meta")

        with (
            replaced(config, {"random_mask": lambda *_, **__: None}),
            replaced(layer.ShiraLayer, {"update_layer": placed}),
            replaced(layer.Linear, {"get_delta_weight": _update_without_data}),
        ):
            yield

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the rank, and check one that is given."""
        options: Any = self
        most = {name: i * o // (i + o) for name, (i, o) in shapes.items()}
        smallest = min(most, key=most.__getitem__)
        rank = options.r or max(1, min(RANK, most[smallest] // 2))
        if rank > most[smallest]:
            raise AdapterError(
                f"adapter.r: {rank} asks for more entries than {smallest!r} has; give at most {most[smallest]}."
            )
        return {"r": rank}


def _update_without_data(layer: Any, name: str) -> Tensor:
    """Return S of a layer on the meta device, shape (out, in)."""
    from ludwig_peft_plugin.estimate.sparse import empty_sparse

    values = layer.shira_weight[name] * layer.scaling[name]
    return empty_sparse(values, layer.shira_indices[name], (layer.out_features, layer.in_features))
