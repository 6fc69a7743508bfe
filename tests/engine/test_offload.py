"""Layer inputs go to the host and back unharmed, whenever within its rights the device makes the copies."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.engine.checkpoint import checkpointable_layers, install
from ludwig_peft_plugin.engine.offload import HostStore

LAYERS = 5
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class LazyQueue:
    """The laziest order that is allowed: copies are made, in turn, when one of them is waited for.

    Memory of the device that nobody holds any more is lost: a copy out of it reads NaN, one into it is an error. Memory
    that is still to be filled holds NaN.
    """

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.log: list[str] = []
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._started = 0

    def allocate(self, size: int) -> torch.Tensor:
        self.buffers.append(torch.full((size,), 255, dtype=torch.uint8))
        return self.buffers[-1]

    def start(self, target: torch.Tensor, source: torch.Tensor) -> int:
        to_host = self._is_host(target)
        self.log.append("out" if to_host else "back")
        assert self._is_host(source) != to_host
        if not to_host:
            target.fill_(torch.nan)
        self._started += 1
        # Only the host's side is held: the device's would be reused as soon as it is let go.
        held = (target, weakref.ref(source)) if to_host else (weakref.ref(target), source)
        self._pending.append((self._started, *held))
        return self._started

    @torch.no_grad()
    def wait(self, ticket: int) -> None:
        while self._pending and self._pending[0][0] <= ticket:
            _, target, source = self._pending.pop(0)
            target, source = (side() if isinstance(side, weakref.ref) else side for side in (target, source))
            assert target is not None, "a copy would write over memory that may be in other use"
            target.copy_(source) if source is not None else target.fill_(255)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == buffer.data_ptr() for buffer in self.buffers)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).train()


def offloaded(model: nn.Module, layers: float = 1.0) -> tuple[nn.Module, LazyQueue]:
    model, queue = copy.deepcopy(model), LazyQueue()
    install(model, layers, HostStore(queue))
    return model, queue


def loss(model: nn.Module, length: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 53, (2, length), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    expected, found = gradients(model), gradients(other)
    assert all(gradient.norm() > 0 and torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("layers", [0.2, 0.6, 1.0])
def test_gradients_and_buffers_over_steps(plain, layers):
    """Gradients are equal over micro-batches of several lengths, and the buffers of the first step serve the others."""
    model, queue = offloaded(plain, layers)
    count = max(1, round(layers * LAYERS))
    used = []
    for _ in range(3):
        plain.zero_grad()
        model.zero_grad()
        for length in (16, 9, 12):
            for either in (plain, model):
                loss(either, length).backward()
        assert_same(plain, model)
        used.append(len(queue.buffers))
    assert used == [count - 1] * 3  # the last layer's input stays on the device
    if count > 1:
        assert {len(buffer) for buffer in queue.buffers} == {2 * 16 * 32 * 4}


def test_longer_batches_get_larger_buffers_and_short_ones_go_on_with_theirs(plain):
    model, queue = offloaded(plain)
    for length in (6, 30, 5, 28, 6):
        loss(model, length).backward()
    assert [len(buffer) for buffer in queue.buffers] == [2048] * (LAYERS - 1) + [8192] * (LAYERS - 1)
    alive = [weakref.ref(buffer) for buffer in queue.buffers]
    queue.buffers.clear()
    gc.collect()
    assert all(buffer() is not None for buffer in alive)


def test_an_input_is_fetched_while_the_layer_above_runs(plain):
    model, queue = offloaded(plain)
    for index, layer in enumerate(checkpointable_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: queue.log.append(f"layer {index}"))
    loss(model, 8).backward()
    forward = [event for index in range(LAYERS - 1) for event in ("out", f"layer {index}")] + [f"layer {LAYERS - 1}"]
    backward = [event for index in reversed(range(1, LAYERS)) for event in ("back", f"layer {index}")] + ["layer 0"]
    assert queue.log == forward + backward


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_before_their_backward_passes(plain, order):
    model, queue = offloaded(plain)
    plain.zero_grad()
    for either in (plain, model):
        losses = [loss(either, 8, seed=1), loss(either, 11, seed=2)]
        for index in order:
            losses[index].backward()
    assert_same(plain, model)
    assert len(queue.buffers) == 2 * (LAYERS - 1)


def test_a_forward_pass_without_backward_gives_its_buffers_back(plain):
    model, queue = offloaded(plain)
    abandoned = loss(model, 8)
    del abandoned
    gc.collect()
    plain.zero_grad()
    for either in (plain, model):
        loss(either, 8).backward()
    assert_same(plain, model)
    assert len(queue.buffers) == LAYERS - 1


def test_a_forward_pass_that_fails_gives_its_buffers_back(plain):
    model, queue = offloaded(plain)
    failing = checkpointable_layers(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        loss(model, 8)
    gc.collect()
    failing.remove()
    plain.zero_grad()
    for either in (plain, model):
        loss(either, 8).backward()
    assert_same(plain, model)
    assert len(queue.buffers) == LAYERS - 1


def fail(*_: object) -> None:
    raise MemoryError


def test_a_backward_pass_that_fails_leaves_nothing_half_copied(plain):
    model, queue = offloaded(plain)
    result = loss(model, 8)
    failing = checkpointable_layers(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        result.backward()
    failing.remove()
    del result
    gc.collect()
    plain.zero_grad()
    model.zero_grad()
    for either in (plain, model):
        loss(either, 8).backward()
    assert_same(plain, model)
    assert len(queue.buffers) == LAYERS - 1


def test_the_device_keeps_one_input_between_the_passes(plain):
    """After the forward pass the only input of a layer that lives on is the last one's."""
    model, queue = offloaded(plain)
    inputs: list[weakref.ref[torch.Tensor]] = []
    for layer in checkpointable_layers(model):
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    result = loss(model, 8)
    gc.collect()
    assert [tensor() is not None for tensor in inputs] == [False] * (LAYERS - 1) + [True]
    assert all(target is None for target in [*queue._pending] or [None])
    result.backward()


def test_a_second_backward_pass_is_refused(plain):
    model, _ = offloaded(plain)
    result = loss(model, 8)
    result.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"checkpoint_offload.*runs once"):
        result.backward()


def test_a_copied_model_works_beside_the_first(plain):
    model, _ = offloaded(plain)
    other = copy.deepcopy(model)
    plain.zero_grad()
    for either in (plain, model, other):
        loss(either, 8).backward()
    assert_same(plain, model)
    assert_same(plain, other)


def test_layers_with_more_than_one_state_stay_on_the_device(caplog):
    from ludwig_peft_plugin.engine.checkpoint import LayerCheckpoint

    linear, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    ours = LayerCheckpoint(HostStore(LazyQueue()))

    def layer(hidden: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        return linear(hidden) + len(states)

    with caplog.at_level("WARNING", "ludwig_peft_plugin"):
        for _ in range(2):
            outputs = ours(layer, x, {})
    assert torch.equal(outputs, checkpoint(layer, x, {}, use_reentrant=False))
    assert [record.message.split(":")[0] for record in caplog.records] == ["trainer.checkpoint_offload"]
