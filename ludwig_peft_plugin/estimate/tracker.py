"""Follow every storage that a computation on meta tensors makes and drops, as a GPU's allocator would.

PyTorch's autograd decides what is kept for the backward pass and when it is freed; that is the same without data. So
a training step is run on meta tensors, each new storage is counted from the operation that makes it until the last
tensor on it is gone, and the most that was counted at once is what `torch.cuda.max_memory_allocated` would report.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ludwig_peft_plugin.estimate.no_data import NoData
from ludwig_peft_plugin.estimate.operators import dequantizes, needs_weight, workspace
from ludwig_peft_plugin.estimate.storage import allocated, storages

ACTIVATIONS = "activations"
LOSS = "logits and loss"
GRADIENTS = "gradients"
DEQUANTISED = "dequantised weights"
BACKWARD = "backward workspace"
OPTIMISER = "optimiser workspace"
KEPT = "kept between steps"
GRAPHS = "CUDA graphs"


class MemoryTracker(NoData):
    """Counts the bytes of new storages while it is active; it can be active several times, for one step each.

    Args:
        resident: tensors that are there before (weights, optimiser state) and are not counted.

    Attributes:
        phase: the part that new storages belong to.
        live: bytes that are held now.
        peak: the most bytes that were held at once.
        at_peak: how these were distributed among parts.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.phase = ACTIVATIONS
        self.live = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._parts: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        self._resident = set(storages(resident))

    def begin(self, resident: Iterable[Tensor], distinct: int) -> None:
        """Begin a step; what earlier ones have left alive (casts of weights, say) stays counted.

        Args:
            resident: tensors that are there before and are not counted.
            distinct: how many distinct values there are at most where an operation gives those of a tensor.
        """
        self._resident = set(storages(resident))
        self._held = {key: (KEPT, size) for key, (_, size) in self._held.items()}
        self._parts = Counter({KEPT: self.live} if self.live else {})
        self.phase, self.distinct = ACTIVATIONS, distinct
        self.peak, self.at_peak = self.live, dict(self._parts)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of one operation, after counting what it takes."""
        result = super().run(func, args, kwargs)
        part = DEQUANTISED if dequantizes(func, args) else self.phase
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, part)
        passing = workspace(func, args, kwargs)
        if passing:
            self._record({DEQUANTISED if needs_weight(func) else self.phase: allocated(passing)})
        return result

    def is_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such, whatever made its storage."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._held:
            part, size = self._held[key]
            self._held[key] = (GRADIENTS, size)
            self._parts[part] -= size
            self._parts[GRADIENTS] += size

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count what `tensor` lies in: host memory."""
        self._resident |= storages([tensor]).keys()

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self._held or key in self._resident:
            return
        size = allocated(storage.nbytes())
        self._held[key] = (part, size)
        self._parts[part] += size
        self.live += size
        weakref.finalize(storage, self._remove, key)
        self._record({})

    def _remove(self, key: int) -> None:
        part, size = self._held.pop(key)
        self._parts[part] -= size
        self.live -= size

    def _record(self, passing: dict[str, int]) -> None:
        """Keep the distribution if it is the largest so far; `passing` is held only within one operation."""
        total = self.live + sum(passing.values())
        if total > self.peak:
            self.peak = total
            self.at_peak = dict(self._parts + Counter(passing))
