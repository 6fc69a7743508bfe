"""Makes the next batches in a background thread while the model works on this one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Queue
from types import TracebackType

import torch

from ludwig_peft_plugin.data.batches import StepBatch

DEPTH = 2  # batches made ahead


class Prefetch(Iterator[StepBatch]):
    """Batches in order, each made ahead of time and, for a GPU, laid in page-locked memory.

    Making a batch must draw no random numbers: it runs at an unspecified time beside the training step. An error in
    making one is raised where that batch is asked for. `close`, the end of a `with` block, or losing the last
    reference ends the thread.
    """

    def __init__(self, make: Callable[[int], StepBatch], steps: Iterable[int], device: torch.device | str) -> None:
        """Begin to make batches.

        Args:
            make: returns the batch of a step.
            steps: the steps, in order.
            device: where the batches will be used.
        """
        self._ready: Queue[StepBatch | BaseException | None] = Queue(maxsize=DEPTH)
        stop = threading.Event()
        gpu: int | None = None
        if torch.device(device).type == "cuda":
            index = getattr(torch.device(device), "index", None)
            gpu = torch.cuda.current_device() if index is None else index
        thread = threading.Thread(
            target=_produce, args=(make, steps, gpu, self._ready, stop), name="prefetch", daemon=True
        )
        # Neither the thread nor this holds on to the iterator itself, so that one that was forgotten ends too.
        self._end = weakref.finalize(self, _finish, self._ready, stop, thread)
        thread.start()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> StepBatch:
        if not self._end.alive:
            raise StopIteration
        batch = self._ready.get()
        if isinstance(batch, StepBatch):
            return batch
        self.close()
        raise batch or StopIteration

    def close(self) -> None:
        """End the thread and forget the batches that were made ahead."""
        self._end()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _produce(
    make: Callable[[int], StepBatch],
    steps: Iterable[int],
    gpu: int | None,
    ready: Queue[StepBatch | BaseException | None],
    stop: threading.Event,
) -> None:
    """Put the batches of `steps` into `ready`, then None; an error goes in their place."""
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # page-locked memory is allocated through the thread's device
        for step in steps:
            if stop.is_set():
                return
            batch = make(step)
            if gpu is not None:
                batch = StepBatch.of([part.pin_memory() for part in batch.micro_batches])
            ready.put(batch)
        ready.put(None)
    except BaseException as error:
        ready.put(error)


def _finish(ready: Queue[StepBatch | BaseException | None], stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread. It may wait for room, and puts a batch and the end mark at most: emptying the queue once does."""
    stop.set()
    while True:
        try:
            ready.get_nowait()
        except Empty:
            break
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()
