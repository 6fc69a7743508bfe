"""Layer inputs kept in page-locked host memory between forward and backward pass, copied beside the computation.

    forward of layer i:   compute stream  | layer i ........................ | wait for the copy
                          copy stream     | input of i to the host |
    backward of layer i:  compute stream  | layer i again, its gradients .......... | wait for the copy
                          copy stream     | input of i - 1 to the device |

All copies, both ways, run on one stream in the order in which they were started. So a host buffer can be handed on as
soon as the copy out of it has been started. Device memory is given back only after the compute stream has waited for
the copy that reads it, so that no more than two inputs are on the device at a time, however far the host is ahead.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class CopyQueue(Protocol):
    """Copies that run beside the computation, one after another."""

    def allocate(self, size: int) -> Tensor:
        """Return host memory for the copies: `size` bytes, uint8."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy `source` to `target` once what was computed up to now is done; return a ticket."""

    def wait(self, ticket: Any) -> None:
        """Let the computation wait for the copy of `ticket`; the host goes on."""


class CudaCopyQueue:
    """Copies on a stream of their own beside the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        """Return page-locked memory.

        Raises:
            RuntimeError: the host has too little memory that can be locked.
        """
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"trainer.checkpoint_offload: {size / 2**20:.0f} MiB of page-locked host memory cannot be had "
                f"({error}). Use smaller micro-batches (tokens_per_batch or batch_size), or remove the option."
            ) from error

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket)


class HostStore:
    """Host memory for the layer inputs of a model: as many buffers as are needed at a time, used again every step.

    No buffer is ever freed, since a recorded CUDA graph goes on using its own; nothing else may be checkpointed between
    the forward and the backward pass of such a graph.
    """

    def __init__(self, queue: CopyQueue) -> None:
        self.queue = queue
        self._free: list[Tensor] = []
        self._latest: weakref.ref[KeptInput] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """Return the same store: the layers of a copied model may share the buffers, which hold nothing lasting."""
        return self

    def keep(self, hidden: Tensor, *, on_device: bool = False) -> KeptInput:
        """Start to copy a layer's input to the host.

        Args:
            hidden: the input; it must not change before `KeptInput.settle`.
            on_device: leave it where it is, since its backward pass comes first.
        """
        buffer = None if on_device else self._take(hidden.nbytes)
        kept = KeptInput(self, hidden, buffer, self._latest)
        self._latest = weakref.ref(kept)
        return kept

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer from which the last copy has been started."""
        self._free.append(buffer)

    def _take(self, size: int) -> Tensor:
        fitting = [place for place, buffer in enumerate(self._free) if len(buffer) >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda place: len(self._free[place])))
        # PyTorch rounds page-locked memory up to powers of two; so the whole of it can be used.
        return self.queue.allocate(1 << max(size - 1, 0).bit_length())


class KeptInput:
    """A layer's input on its way to the host and back."""

    def __init__(
        self, store: HostStore, hidden: Tensor, buffer: Tensor | None, previous: weakref.ref[KeptInput] | None
    ) -> None:
        self._store = store
        self._previous = previous  # kept just before: the one that the backward pass needs next
        self._buffer = buffer
        self._device: Tensor | None = hidden
        self._ticket: Any = None
        if buffer is not None:
            self._like = (hidden.shape, hidden.dtype, hidden.device)
            self._ticket = store.queue.start(self._in(buffer), hidden)

    def settle(self) -> None:
        """Give up the device's memory: called when the layer's forward pass has been queued."""
        if self._buffer is not None:
            self._store.queue.wait(self._ticket)
            self._device = self._ticket = None

    def take(self) -> Tensor:
        """Return the input on the device, and start to fetch the one that was kept before it. Only once.

        Raises:
            RuntimeError: it was taken before.
        """
        self.fetch()
        if self._device is None:
            raise RuntimeError(
                "The inputs of checkpointed layers have been used: with trainer.checkpoint_offload a backward pass "
                "runs once"
            )
        if self._ticket is not None:
            self._store.queue.wait(self._ticket)
        hidden, self._device, self._ticket = self._device, None, None
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()
        return hidden

    def fetch(self) -> None:
        """Start to copy the input back, unless that has been done."""
        if self._buffer is None or self._device is not None:
            return
        shape, dtype, device = self._like
        self._device = torch.empty(shape, dtype=dtype, device=device)
        self._ticket = self._store.queue.start(self._device, self._in(self._buffer))
        self._store.give(self._buffer)
        self._buffer = None

    def _in(self, buffer: Tensor) -> Tensor:
        """Return the part of a host buffer that holds the input."""
        shape, dtype, _ = self._like
        return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def __del__(self) -> None:
        """Give the memory back where no backward pass came, as when a forward pass has run out of memory."""
        if self._buffer is not None:
            self._store.give(self._buffer)
        if self._ticket is not None:
            self._store.queue.wait(self._ticket)  # a copy is under way: the device's memory must not be used before
