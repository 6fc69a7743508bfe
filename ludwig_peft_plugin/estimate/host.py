"""Host memory in a world without data: what lies there is not counted as the GPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ludwig_peft_plugin.estimate.tracker import MemoryTracker


class HostMemory:
    """Host memory, and copies to it and back (engine/offload.py) that move nothing.

    Args:
        tracker: what counts GPU memory.

    Attributes:
        buffers: the host memory handed out so far.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        self.buffers: list[Tensor] = []
        self._tracker = tracker

    def allocate(self, size: int) -> Tensor:
        """Return `size` bytes of host memory."""
        with _disable_current_modes():
            buffer = torch.empty(size, dtype=torch.uint8, device="meta")
        self.buffers.append(buffer)
        self._tracker.leave_out(buffer)
        return buffer

    def hold(self, tensor: Tensor) -> Tensor:
        """Return a tensor like `tensor` in host memory, to stand in its place."""
        return self.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy nothing."""
        return None

    def wait(self, ticket: Any) -> None:
        """Wait for nothing."""
