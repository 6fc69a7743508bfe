"""The optimiser's state is that of the real optimiser after one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.estimate.optimiser import OptimiserMemory, optimiser_memory
from ludwig_peft_plugin.estimate.storage import allocated_bytes

SHAPES = [(16, 512), (512, 16), (640, 320), (96,)]
PLAIN = ["adamw", "adam", "sgd", "adagrad", "adadelta", "adamax", "nadam", "rmsprop", "radam", "adafactor", "muon"]
EIGHT_BIT = ["adamw_8bit", "adam_8bit", "lion_8bit", "rmsprop_8bit", "lion", "lamb"]


def parameters(device: str = "meta") -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, device=device)) for shape in SHAPES]


def section(kind: str, **options: Any) -> Any:
    from ludwig.schema.optimizers import get_optimizer_cls

    return get_optimizer_cls(kind)(**options)


def real_state(kind: str) -> int:
    """Return the bytes of the state after a real step on the CPU, as a GPU's allocator would take them."""
    from ludwig.modules import optimization_modules

    optimiser_class, arguments = optimization_modules.get_optimizer_class_and_kwargs(section(kind), 1e-4)
    trained = parameters("cpu")
    fused = kind in ("adam", "adamw")  # as on a GPU, where it also counts steps
    optimiser = optimiser_class(trained, **arguments, **({"fused": True} if fused else {}))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    tensors = [value for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value)]
    # Other step counts are scalars on the host.
    return allocated_bytes(tensor for tensor in tensors if tensor.dim() or fused or kind == "adafactor")


@pytest.mark.parametrize("kind", [*PLAIN, *EIGHT_BIT])
def test_state_is_that_of_a_real_step(kind: str, registered: None) -> None:
    memory = optimiser_memory(section(kind), parameters())
    assert memory.state == real_state(kind)
    assert memory.paged == 0


def test_momentum_is_counted(registered: None) -> None:
    assert optimiser_memory(section("sgd"), parameters()).state == 0
    assert optimiser_memory(section("sgd", momentum=0.9), parameters()).state == allocated_bytes(parameters())


def test_paged_state_does_not_lie_on_the_gpu(registered: None) -> None:
    """The state of (640, 320), the one parameter of 100,000 numbers or more, is in managed memory."""
    paged, resident = (optimiser_memory(section(kind), parameters()) for kind in ("paged_adamw_8bit", "adamw_8bit"))
    assert paged.paged == 2 * 640 * 320
    assert resident.state - paged.state == paged.paged


def test_the_step_of_many_tensors_takes_memory_and_the_fused_one_none(registered: None) -> None:
    trained = parameters()
    assert optimiser_memory(section("adamax"), trained).step >= allocated_bytes(trained) / 2
    assert optimiser_memory(section("adamw"), trained).step == 0


def test_an_optimiser_that_needs_more_than_gradients_is_an_error(registered: None) -> None:
    with pytest.raises(ModelError, match=r"trainer\.optimizer\.type.*lbfgs"):
        optimiser_memory(section("lbfgs"), parameters())


def test_memory_is_in_bytes() -> None:
    assert OptimiserMemory(state=1, paged=2, step=3).state == 1
