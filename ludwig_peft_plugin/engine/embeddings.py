"""The input embedding in page-locked host memory, read by the GPU through its own addresses.

A GPU addresses page-locked host memory as it does its own (unified virtual addressing), over the bus. A look-up reads
only the rows of the tokens at hand, a few megabytes a step, so the matrix need not take up device memory: 1.0 GiB for
a vocabulary of 128,256 and a hidden size of 4,096 in bfloat16. The weight stays a CUDA tensor to PyTorch, so look-ups
are ordinary kernels that need no copy of the ids on the host and may be recorded in a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.errors import ModelError

logger = logging.getLogger(__name__)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a weight's elements: array interfaces know no bfloat16."""


def offload_embedding(model: Any, to_host: Callable[[Tensor], Tensor] | None = None) -> int:
    """Move the frozen input embedding of a model to host memory, for good; nothing else about the model changes.

    Args:
        model: a transformers model, with or without PEFT around it, with its adapter attached.
        to_host: how a weight is moved; `host_view` unless given.

    Returns:
        The bytes of device memory this frees.

    Raises:
        ModelError: the embedding is trained, tied to another layer or not a matrix, or the model is not on a GPU.
    """
    base = unwrapped(model)
    embedding = base.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        raise ModelError(
            "trainer.embedding_offload: the input embedding is trained. Leave it out of adapter.target_modules and "
            "adapter.modules_to_save, or remove the option."
        )
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(
            f"trainer.embedding_offload: the input embedding is a {type(embedding).__name__}, not just a matrix of "
            "rows. Remove the option."
        )
    weight = embedding.weight
    if sum(parameter is weight for module in base.modules() for parameter in module._parameters.values()) > 1:
        raise ModelError(
            "trainer.embedding_offload: this model's input embedding is also its output matrix "
            "(tie_word_embeddings), which every step reads as a whole. Remove the option."
        )
    embedding.weight = nn.Parameter((to_host or host_view)(weight.detach()), requires_grad=False)
    logger.info("The input embedding (%.2f GiB) is kept in host memory.", weight.nbytes / 2**30)
    return weight.nbytes


def host_view(weight: Tensor) -> Tensor:
    """Return a CUDA tensor equal to `weight`, on its device, whose numbers lie in page-locked host memory.

    Raises:
        ModelError: `weight` is not on a CUDA device, or the host has too little memory that can be locked.
    """
    device = weight.device
    if device.type != "cuda":
        raise ModelError(
            f"trainer.embedding_offload: the model is on the device {device.type!r}; only for a GPU is the host's "
            "memory another one. Remove the option."
        )
    with torch.cuda.device(device):
        try:
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
        except RuntimeError as error:
            raise ModelError(
                f"trainer.embedding_offload: {weight.nbytes / 2**30:.1f} GiB of page-locked host memory cannot be had "
                f"({error}). Remove the option."
            ) from error
        host.copy_(weight)
        return torch.as_tensor(DeviceAddress(host), device=device).view(weight.dtype)


class DeviceAddress:
    """Page-locked memory described as an array of the device (CUDA array interface, version 3).

    The tensor made of it holds this object, and with it the memory.
    """

    def __init__(self, host: Tensor) -> None:
        """Describe `host`, a contiguous tensor in page-locked memory."""
        self._host = host.view(INTEGERS[host.element_size()])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The fields of numba's and CuPy's protocol."""
        return {
            "shape": tuple(self._host.shape),
            "typestr": f"<i{self._host.element_size()}",
            "data": (self._host.data_ptr(), False),
            "version": 3,
        }
