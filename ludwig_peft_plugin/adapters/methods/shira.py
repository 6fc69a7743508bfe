"""`adapter: {type: shira}`: some entries of each weight, chosen at random."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

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
        import torch

        if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
            torch.sparse.check_sparse_tensor_invariants.disable()
        return nullcontext()

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
