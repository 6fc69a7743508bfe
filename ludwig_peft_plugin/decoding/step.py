"""Forward passes of generation: prompts into slots, and blocks of steps that add one token to every slot."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ludwig_peft_plugin.decoding.attention import Visible
from ludwig_peft_plugin.decoding.cache import Places, SlotCache
from ludwig_peft_plugin.decoding.choice import Choice, choose

logger = logging.getLogger(__name__)

WORTH_A_GRAPH = 16
"""From how many steps on recording a CUDA graph, which costs about three of them, is worth it."""


class Steps:
    """Runs a model over the slots of a cache.

    On a GPU a step is recorded once as a CUDA graph and then replayed: one token of a small model is a thousand short
    kernels, which take longer to launch from Python than to run. Nothing is compiled, so it pays from a few steps on.

    Attributes:
        cache: keys and values of the slots.
        graphs: whether steps may be recorded; off where the model's kernels cannot be.
    """

    def __init__(self, base: Any, cache: SlotCache, choice: Choice, device: torch.device, *, graphs: bool) -> None:
        self.base = base
        self.cache = cache
        self.choice = choice
        self.device = device
        self.graphs = graphs
        self._graph: Any = None
        self._allocate()

    def _allocate(self) -> None:
        """Make the tensors a step reads and writes; their addresses are part of a recorded graph."""
        slots = self.cache.slots
        self._tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._uniform = torch.zeros(slots, dtype=torch.float64, device=self.device)
        self._log_probabilities = torch.zeros(slots, device=self.device)
        self._slots = torch.arange(slots, device=self.device)

    def resize(self, kept: list[int], slots: int, capacity: int) -> None:
        """Move the slots `kept` to the front of `slots` slots with `capacity` places each."""
        self._graph = None  # it holds the addresses of the old cache
        self.cache.resize(torch.tensor(kept, dtype=torch.long, device=self.device), slots, capacity)
        self._allocate()

    def read(self, sequences: list[Tensor], slots: list[int], uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of whole sequences into their slots, and choose the token that follows each.

        Args:
            sequences: token ids, each (n,), int64.
            slots: the slot of each sequence.
            uniform: a number for each sequence, (sequences,), float64.

        Returns:
            The tokens, (sequences,), and their log-probabilities.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        ends = lengths.cumsum(0)
        owners = torch.repeat_interleave(torch.tensor(slots), lengths).to(self.device)
        positions = torch.cat([torch.arange(int(length)) for length in lengths]).to(self.device)
        boundaries = torch.cat([ends.new_zeros(1), ends]).int().to(self.device)
        self.cache.places = Places(owners, positions)
        logits = self.base(
            input_ids=torch.cat(sequences)[None].to(self.device),
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=(ends - 1).to(self.device),
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=int(lengths.max()),
            max_length_k=int(lengths.max()),
        ).logits[0]
        return choose(logits, self.choice, uniform.to(self.device))

    def block(
        self, tokens: Tensor, positions: Tensor, uniform: Tensor, steps: int, *, remaining: int
    ) -> tuple[Tensor, Tensor]:
        """Add `steps` tokens to every slot, without asking the device in between whether an answer has ended.

        Args:
            tokens: the last token of each slot, shape (slots,); anything where a slot is free.
            positions: its place, shape (slots,); free slots have 0. All must stay below the capacity for `steps` steps.
            uniform: shape (slots, steps), float64.
            steps: how many tokens to add.
            remaining: the most steps that may still follow with these slots, which decides about recording a graph.

        Returns:
            The tokens and their log-probabilities, each (steps, slots), on the CPU.
        """
        if self.graphs and self._graph is None and remaining >= WORTH_A_GRAPH:
            self._start(tokens, positions)
            self._record()
        self._start(tokens, positions)
        uniform = uniform.to(self.device)
        chosen = torch.empty((steps, self.cache.slots), dtype=torch.long, device=self.device)
        log_probabilities = torch.empty((steps, self.cache.slots), device=self.device)
        looked_at = int(positions.max()) + 1
        for index in range(steps):
            if self.choice.sample:
                self._uniform.copy_(uniform[:, index])
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step(looked_at + index)
            chosen[index] = self._tokens
            log_probabilities[index] = self._log_probabilities
        return chosen.cpu(), log_probabilities.cpu()

    def _start(self, tokens: Tensor, positions: Tensor) -> None:
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)

    def _step(self, length: int) -> None:
        """Add one token to every slot, looking at the first `length` places of the cache."""
        self.cache.places = Places(self._slots, self._positions, length)
        logits = self.base(
            input_ids=self._tokens[:, None],
            position_ids=self._positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            visible=Visible(self._positions, length),
        ).logits[:, -1]
        tokens, log_probabilities = choose(logits, self.choice, self._uniform)
        self._tokens.copy_(tokens)
        self._log_probabilities.copy_(log_probabilities)
        self._positions.add_(1).clamp_(max=self.cache.capacity - 1)  # free slots count on too

    def _record(self) -> None:
        """Record a step as a CUDA graph; where its kernels do not allow that, say so and go on without.

        The step that is run first, to set up the libraries' workspaces, writes what the next real step writes again.
        """
        capacity = self.cache.capacity
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[current.device_index]
        random_state = generator.clone_state()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self._step(capacity)
            current.wait_stream(side)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(capacity)
        except RuntimeError as error:
            # A recording that fails may leave its own stream, and the random numbers waiting for the recording's end.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(random_state)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.graphs = False
            reason = str(error).strip().splitlines()[0]
            logger.warning("This model's generation cannot be recorded as a CUDA graph (%s); it runs slower.", reason)
            return
        self._graph = graph
