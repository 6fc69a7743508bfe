"""The estimate itself: what a training run holds on the GPU at its peak, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ludwig_peft_plugin.estimate import tracker as parts
from ludwig_peft_plugin.estimate.batch import BatchShape
from ludwig_peft_plugin.estimate.meta_model import MetaLLM
from ludwig_peft_plugin.estimate.optimiser import OptimiserMemory, optimiser_memory
from ludwig_peft_plugin.estimate.step import StepMemory, step_memory
from ludwig_peft_plugin.estimate.storage import allocated, allocated_bytes, storages

GIB = 2**30
BASE, ADAPTER, OPTIMISER_STATE, CUBLAS = "base", "adapter", "optimiser state", "cuBLAS workspaces"

CUBLAS_WORKSPACES = 2 * 32 * 2**20
"""cuBLAS takes 32 MiB on Hopper for each of the two threads (forward, backward), through PyTorch's allocator."""
CUDA_CONTEXT = round(0.6 * GIB)
"""The CUDA context and the kernels loaded into it, outside PyTorch's allocator."""
ALLOCATOR_SLACK = 0.03
"""The part of what PyTorch's allocator reserves that lies in gaps between tensors."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers there are: in the base, in the adapter, and of all these the trained ones."""

    base: int
    adapter: int
    trained: int


@dataclass(frozen=True)
class Estimate:
    """The memory of a training run with micro-batches of one shape.

    Attributes:
        shape: the micro-batch.
        parameters: how many numbers the model has.
        at_peak: bytes of each part at the moment of the peak; their sum is `peak`.
        paged: bytes of optimiser state that can move to the host, not part of the peak.
        saved: bytes that the forward pass leaves for the backward pass.
        obstacle: why activations come from a closed formula; None where they were followed on the meta device.
    """

    shape: BatchShape
    parameters: Parameters
    at_peak: dict[str, int]
    paged: int
    saved: int
    obstacle: str | None = None

    @property
    def peak(self) -> int:
        """What `torch.cuda.max_memory_allocated` would report, in bytes."""
        return sum(self.at_peak.values())

    @property
    def slack(self) -> int:
        """Bytes the allocator holds without use, an assumption."""
        return round(self.peak * ALLOCATOR_SLACK)

    @property
    def needed(self) -> int:
        """Bytes of GPU memory with the CUDA context and the allocator's slack."""
        return self.peak + self.slack + CUDA_CONTEXT


class Estimator:
    """Estimates the memory of one config for any size of batch; the model is built once."""

    def __init__(self, config_obj: Any) -> None:
        self.config_obj = config_obj
        self.llm = MetaLLM(config_obj)
        base = self.llm.base_storages
        extra = self.llm.adapter_tensors()
        self.base_bytes = sum(allocated(size) for size in base.values())
        self.adapter_bytes = allocated_bytes(extra)
        trained = list(self.llm.trained.values())
        self.parameters = _count(self.llm)
        self.gradient_bytes = sum(allocated(parameter.nbytes) for parameter in trained)
        self.optimiser: OptimiserMemory = optimiser_memory(config_obj.trainer.optimizer, trained)

    def estimate(self, shape: BatchShape) -> Estimate:
        """Return the memory with micro-batches of `shape`."""
        step = step_memory(self.llm, shape)
        if step.peak >= self.gradient_bytes + self.optimiser.step:
            passing = step.at_peak
        else:  # the optimiser's step needs more than the passes through the model
            passing = {parts.GRADIENTS: self.gradient_bytes, parts.OPTIMISER: self.optimiser.step}
        return self._estimate(shape, passing, step)

    def evaluation(self, shape: BatchShape) -> Estimate:
        """Return the memory of evaluating the loss on batches of `shape`, in a run that has trained before."""
        step = step_memory(self.llm, shape, train=False)
        return self._estimate(shape, step.at_peak, step)

    def _estimate(self, shape: BatchShape, passing: dict[str, int], step: StepMemory) -> Estimate:
        resident = {
            BASE: self.base_bytes,
            ADAPTER: self.adapter_bytes,
            OPTIMISER_STATE: self.optimiser.state,
            CUBLAS: CUBLAS_WORKSPACES,
        }
        at_peak = {**resident, **passing}
        return Estimate(shape, self.parameters, at_peak, self.optimiser.paged, step.saved, step.obstacle)


def _count(llm: MetaLLM) -> Parameters:
    base = adapter = trained = 0
    for parameter in llm.model.parameters():
        count = _numbers(parameter)
        trained += count if parameter.requires_grad else 0
        if set(storages([parameter])) <= llm.base_storages.keys():
            base += count
        else:
            adapter += count
    return Parameters(base, adapter, trained)


def _numbers(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for; a 4-bit one holds two to the byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else int(shape.numel())
