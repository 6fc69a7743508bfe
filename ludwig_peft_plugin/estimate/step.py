"""Run one training step on the meta device and say how much memory it takes, and for what."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ludwig_peft_plugin.engine import graphs
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.estimate import tracker as parts
from ludwig_peft_plugin.estimate.batch import BatchShape
from ludwig_peft_plugin.estimate.formula import formula_parts
from ludwig_peft_plugin.estimate.gpu_view import gpu_view
from ludwig_peft_plugin.estimate.meta_model import MetaLLM, gpu_precision
from ludwig_peft_plugin.estimate.storage import allocated_bytes, model_tensors


@dataclass(frozen=True)
class StepMemory:
    """What a forward and backward pass hold beside weights and optimiser state.

    Attributes:
        at_peak: bytes of each part when the most are held.
        saved: bytes that the forward pass leaves for the backward pass.
        obstacle: why the model could not be run on the meta device and the closed formula was used; None if it ran.
    """

    at_peak: dict[str, int]
    saved: int
    obstacle: str | None = None

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return sum(self.at_peak.values())


def step_memory(llm: MetaLLM, shape: BatchShape, *, train: bool = True) -> StepMemory:
    """Return the memory of the last micro-batch of an optimiser step.

    Args:
        llm: the model, with its adapter.
        shape: the micro-batch.
        train: whether there is a backward pass; an evaluation has none.
    """
    try:
        return _run(llm, shape, train)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        # What depends on data (routing among experts, say) has no meta form in every model.
        obstacle = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    activations, loss, backward = formula_parts(llm, shape)
    if not train:
        activations = 0
    last = {parts.LOSS: loss} if loss > backward or not train else {parts.BACKWARD: backward}
    return StepMemory({parts.ACTIVATIONS: activations, **last}, activations, obstacle)


def _run(llm: MetaLLM, shape: BatchShape, train: bool) -> StepMemory:
    trained = list(llm.trained.values())
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if shape.accumulated and train else None
    earlier = [parameter.grad for parameter in trained if parameter.grad is not None]
    tracker = llm.tracker
    tracker.begin([*model_tensors(llm.model), *earlier, *llm.host.buffers], distinct=shape.longest)
    before = tracker.live
    batch = shape.on_meta()
    llm.model.train(train)
    try:
        with _quiet(), gpu_view(_autocast(llm)), llm.stand_ins(), _gradients_marked(llm), _loss_marked(llm), tracker:
            with torch.set_grad_enabled(train):
                result: Any = llm(batch)
            saved = tracker.live - before
            if train:
                tracker.phase = parts.BACKWARD
                (result.loss_sum / shape.targets).backward()
            del result
    finally:
        for parameter in trained:
            parameter.grad = None
        llm.model.train()
    at_peak = dict(tracker.at_peak)
    if earlier:
        at_peak[parts.GRADIENTS] = at_peak.get(parts.GRADIENTS, 0) + allocated_bytes(earlier)
    if train:
        at_peak[parts.GRAPHS] = _graph_bytes(llm, shape)
    return StepMemory(at_peak, saved)


def _graph_bytes(llm: MetaLLM, shape: BatchShape) -> int:
    """Return what a recorded CUDA graph holds for good: the final states, their gradient and those of the adapters."""
    base = unwrapped(llm.model)
    if not graphs.can_be_graphed(base, getattr(base, base.base_model_prefix, None)):
        return 0
    states = 2 * shape.tokens * base.config.get_text_config().hidden_size * base.dtype.itemsize
    # Micro-batches that are added up share the buffers of the gradients.
    return states + (0 if shape.accumulated else sum(parameter.nbytes for parameter in llm.trained.values()))


def _autocast(llm: MetaLLM) -> torch.dtype | None:
    """Return the dtype of mixed precision, which is for weights kept in float32."""
    config = llm.config_obj
    if getattr(config.adapter, "trains_base", False):
        mixed = config.adapter.compute == "bfloat16" or (config.adapter.compute, config.precision) == ("auto", "auto")
    else:
        mixed = config.trainer.use_mixed_precision
    return torch.bfloat16 if mixed and gpu_precision(config) == torch.float32 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what layers remark on every call, of which there are hundreds."""
    remarks = logging.getLogger("bitsandbytes")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)


@contextmanager
def _gradients_marked(llm: MetaLLM) -> Iterator[None]:
    """Count the trained parameters' gradients as such when they are made."""
    handles = [p.register_post_accumulate_grad_hook(llm.tracker.is_gradient) for p in llm.trained.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _loss_marked(llm: MetaLLM) -> Iterator[None]:
    """Count what is made after the last hidden states as the loss's."""
    base = unwrapped(llm.model)
    backbone = getattr(base, base.base_model_prefix, None)
    if backbone is None or backbone is base:
        yield
        return

    def begin(*_: Any) -> None:
        llm.tracker.phase = parts.LOSS

    handle = backbone.register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()
