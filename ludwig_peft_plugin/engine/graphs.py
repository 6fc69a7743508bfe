"""Forward and backward passes of the layers as CUDA graphs, for a GPU that would otherwise wait for Python.

A graph is a fixed list of kernels on fixed memory, launched at once. One pair (forward, backward) is captured for each
size of micro-batch that occurs more than once; sizes are rounded up a little, with sequences of filler tokens, so that
there are few. The embedding and all layers are in the graph; the loss, whose size is the number of targets, is not.

Adapter gradients are added up inside the backward graph, in buffers that stand in `parameter.grad`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.fused.group import Adapter
from ludwig_peft_plugin.engine.fused.layer import FusedForward, obstacle
from ludwig_peft_plugin.engine.fused.rows import filled_up
from ludwig_peft_plugin.engine.graph_size import Size
from ludwig_peft_plugin.engine.install import decoder_layers, fused_layers, refresh_adapters
from ludwig_peft_plugin.engine.transformers_attention import flat_row

logger = logging.getLogger(__name__)

SWITCH = "LUDWIG_PEFT_CUDA_GRAPHS"
"""Environment variable; 0 launches every kernel from Python."""

THIS_THREAD = "thread_local"
"""Only what the capturing thread does can spoil a capture: another thread pins the next batches' memory meanwhile."""

MOST_GRAPHS = 16
"""Sizes beyond this many run without a graph: each holds a little memory of its own."""


class _Graph:
    """One captured pair of passes and the memory it reads and writes."""

    def __init__(self, owner: GraphedBackbone, size: Size) -> None:
        device = owner.parameters[0].device
        self.owner, self.size = owner, size
        self.input_ids = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(size.tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.zeros(size.sequences + 1, dtype=torch.int32, device=device)
        self.filler = torch.arange(size.tokens, dtype=torch.int64, device=device)
        self.rows = torch.arange(size.targets, dtype=torch.int64, device=device)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def load(self, batch: MicroBatch) -> None:
        """Copy a micro-batch into place; what is left over becomes one sequence of filler tokens."""
        tokens, sequences = len(batch.input_ids), len(batch.cu_seqlens)
        self.input_ids[:tokens].copy_(batch.input_ids)
        self.position_ids[:tokens].copy_(batch.position_ids)
        self.cu_seqlens[:sequences].copy_(batch.cu_seqlens)
        if tokens < self.size.tokens:
            self.input_ids[tokens:].zero_()
            self.position_ids[tokens:].copy_(self.filler[: self.size.tokens - tokens])
        self.cu_seqlens[sequences:].fill_(self.size.tokens)
        self.rows.copy_(filled_up(batch.target_positions, len(self.rows), self.size.tokens))

    def capture(self) -> None:
        owner = self.owner
        owner.attach_gradients()
        with owner.stand_ins() as stand_ins:
            with torch.cuda.graph(self.forward_graph, pool=owner.pool, capture_error_mode=THIS_THREAD):
                refresh_adapters(owner.base)
                row = (self.input_ids, self.position_ids, self.cu_seqlens, self.size.max_length)
                arguments = flat_row(*row, owner.no_mask)
                states = owner.backbone(**arguments, output_rows=self.rows).last_hidden_state[0]
            self.states = states.detach()
            self.grad = torch.zeros_like(self.states)
            with torch.cuda.graph(self.backward_graph, pool=owner.pool, capture_error_mode=THIS_THREAD):
                torch.autograd.backward(states, self.grad)
                found = [stand_in.grad for stand_in in stand_ins if stand_in.grad is not None]
                torch._foreach_add_(owner.gradients, found)


class GraphedBackbone:
    """The graphs of one model's backbone, valid as long as its trained parameters stay where they are."""

    def __init__(self, base: Any, backbone: Any) -> None:
        self.base, self.backbone = base, backbone
        self.adapters = adapters_of(base)
        self.parameters = [getattr(adapter, name) for adapter, name in self.adapters]
        self.layers = decoder_layers(base)
        self.fused = fused_layers(base)
        self.kept = [layer.memory for layer in self.fused]  # which the graphs write to
        self.places = self._places()
        self.pool = torch.cuda.graph_pool_handle()
        device = self.parameters[0].device
        self.trigger = torch.zeros((), device=device, requires_grad=True)
        self.no_mask = torch.ones((1, 1, 1, 1), dtype=torch.int64, device=device)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.graphs: list[_Graph] = []
        self.seen: set[int] = set()

    def __call__(self, batch: MicroBatch) -> Tensor | None:
        """Return the final hidden states that predict each target, (M, H), or None where no graph should run."""
        size = Size.of(batch)
        graph = next((graph for graph in self.graphs if graph.size.holds(size)), None)
        if graph is None:
            if size.tokens not in self.seen or len(self.graphs) >= MOST_GRAPHS:
                self.seen.add(size.tokens)  # the first time runs from Python, which also compiles the kernels
                return None
            graph = self._captured(size, batch)
        states: Tensor = _Replay.apply(self.trigger, graph, batch)
        return states

    def _captured(self, size: Size, batch: MicroBatch) -> _Graph:
        """Return a new graph, which takes the place of a smaller one with as many tokens."""
        smaller = next((graph for graph in self.graphs if graph.size.resembles(size)), None)
        if smaller is not None:
            size = size.joined(smaller.size)
            self.graphs.remove(smaller)
        graph = _Graph(self, size)
        graph.load(batch)
        graph.capture()
        self.graphs.append(graph)
        logger.debug("Captured a CUDA graph of %d tokens in %d sequences.", size.tokens, size.sequences)
        return graph

    @property
    def is_valid(self) -> bool:
        """Whether the graphs still compute what the model would."""
        return self.places == self._places()

    def attach_gradients(self) -> None:
        """Put the gradient buffers in the parameters' `grad`, with what has been added up there so far."""
        fresh = []
        for parameter, buffer in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                fresh.append(buffer)
                parameter.grad = buffer
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
                parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)

    @contextmanager
    def stand_ins(self) -> Iterator[list[Tensor]]:
        """Put tensors with the parameters' memory in the parameters' place.

        A parameter's own gradient node belongs to the stream of the steps before, which a captured stream must not
        wait for.
        """
        made = [parameter.detach().requires_grad_() for parameter in self.parameters]
        try:
            for (adapter, name), stand_in in zip(self.adapters, made, strict=True):
                setattr(adapter, name, stand_in)
            yield made
        finally:
            for (adapter, name), parameter in zip(self.adapters, self.parameters, strict=True):
                setattr(adapter, name, parameter)

    def _places(self) -> tuple[int, ...]:
        """Return what the graphs depend on. It is asked for every micro-batch, so the model is not searched for it.

        Whoever switches adapters changes what is trained. A pass with another adapter in between has made the layers
        find their parts, and memory for them, anew.
        """
        first = self.layers[0]
        forward = first.__dict__.get("forward")
        return (
            *(parameter.data_ptr() if parameter.requires_grad else 0 for parameter in self.parameters),
            *(id(layer.memory) for layer in self.fused),
            hash(forward.signature()) if isinstance(forward, FusedForward) else 0,
            id(getattr(first, "_gradient_checkpointing_func", None)),
            self.base.get_input_embeddings().weight.data_ptr(),
        )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, graph: _Graph, batch: MicroBatch) -> Tensor:
        ctx.graph, ctx.wanted = graph, batch.target_tokens
        graph.load(batch)
        graph.forward_graph.replay()
        return graph.states[: ctx.wanted]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
        graph, wanted = ctx.graph, ctx.wanted
        graph.grad[:wanted].copy_(grads[0])
        graph.grad[wanted:].zero_()
        graph.owner.attach_gradients()
        graph.backward_graph.replay()
        return None, None, None


def graphed_states(base: Any, backbone: Any, batch: MicroBatch) -> Tensor | None:
    """Return the states that predict each target, (M, H), by a CUDA graph, or None where Python has to run it."""
    if not (base.training and torch.is_grad_enabled() and batch.input_ids.is_cuda):
        return None
    graphed = base.__dict__.get("_ludwig_peft_graphs")
    if graphed is None or (graphed is not False and not graphed.is_valid):
        graphed = GraphedBackbone(base, backbone) if can_be_graphed(base, backbone) else False
        base.__dict__["_ludwig_peft_graphs"] = graphed
    return graphed(batch) if graphed else None


def adapters_of(base: Any) -> list[tuple[Adapter, str]]:
    """Return the places (an adapter and a field of it) of all parameters that fused layers train."""
    return [place for layer in fused_layers(base) for place in layer.adapter_fields(base.dtype)]


def can_be_graphed(base: Any, backbone: Any) -> bool:
    """Return whether every layer is fused, so that nothing in it waits for the host, and only adapters are trained."""
    layers = decoder_layers(base)
    checkpointing = getattr(base, "is_gradient_checkpointing", False)
    return (
        os.environ.get(SWITCH, "1") != "0"
        and bool(layers)
        and len(layers) == base.config.num_hidden_layers
        and len(fused_layers(base)) == len(layers)
        and all(obstacle(layer, base.dtype) is None for layer in layers)
        and 0 < sum(p.requires_grad for p in backbone.parameters()) == len(adapters_of(base))
        and not (checkpointing and not _checkpoints_can_be_captured(layers))
    )


def _checkpoints_can_be_captured(layers: list[Any]) -> bool:
    """Return whether checkpointing is our own; PyTorch's copies the random state to the host."""
    function = getattr(layers[0], "_gradient_checkpointing_func", None)
    return bool(getattr(function, "can_be_captured", False))
