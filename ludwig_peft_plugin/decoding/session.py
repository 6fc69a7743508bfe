"""Rows passing through the slots of one cache: read, generated step by step, and replaced as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ludwig_peft_plugin.decoding.cache import SlotCache
from ludwig_peft_plugin.decoding.choice import Choice
from ludwig_peft_plugin.decoding.memory import pass_tokens
from ludwig_peft_plugin.decoding.rows import Row
from ludwig_peft_plugin.decoding.step import Steps
from ludwig_peft_plugin.rounding import rounded_up

GRANULE = 128
"""Capacities are multiples of this, so that sizes repeat and attention kernels find their alignment."""

HEADROOM = 256
"""New tokens a slot has room for at first. Few answers are as long as they may be; for those the slots grow."""

BLOCK = {"cuda": 8, "cpu": 1}
"""Steps between two looks at which answers have ended. Looking makes a GPU wait; not looking wastes steps."""


def first_capacity(row: Row, choice: Choice) -> int:
    """Return how many tokens a slot has room for when it starts with `row`."""
    return rounded_up(row.length + min(HEADROOM, choice.max_new_tokens - len(row.tokens)), GRANULE)


class Session:
    """One cache and the rows that pass through its slots.

    Attributes:
        waiting: rows without a slot.
        live: the row in each taken slot.
    """

    def __init__(
        self,
        base: Any,
        choice: Choice,
        device: torch.device,
        rows: list[Row],
        slots_for: Callable[[int], int],
        *,
        graphs: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare a session for `rows`, the longest first.

        Args:
            base: the transformers model, attending by `slot_attention`.
            choice: how tokens are chosen.
            device: where the model is.
            rows: what to generate for.
            slots_for: how many slots of a capacity there may be.
            graphs: whether steps may be recorded as CUDA graphs.
            progress: called with 1 for each answer that is whole.
        """
        self.choice = choice
        self.device = device
        self.waiting = deque(rows)
        self.live: dict[int, Row] = {}
        self._slots_for = slots_for
        self._progress = progress
        self._pass_tokens = pass_tokens(base, device)
        self._block = BLOCK.get(device.type, 1)
        capacity = first_capacity(rows[0], choice)
        layers = base.config.get_text_config().num_hidden_layers
        cache = SlotCache(layers, min(len(rows), slots_for(capacity)), capacity)
        self._steps = Steps(base, cache, choice, device, graphs=graphs)

    @property
    def cache(self) -> SlotCache:
        """The cache of the session."""
        return self._steps.cache

    def run(self) -> None:
        """Generate until no row waits or lives."""
        while self.waiting or self.live:
            # Reading one prompt costs a pass of its own, so a few free slots are collected first.
            free = self.cache.slots - len(self.live)
            if self.waiting and (not self.live or free >= max(1, self.cache.slots // 16)):
                self._admit()
            if self.live:
                self._generate()
            self._shrink()

    def _admit(self) -> None:
        """Read waiting rows into free slots, and choose the token that follows each."""
        longest = max(row.length for row in islice(self.waiting, self.cache.slots - len(self.live)))
        if longest >= self.cache.capacity:
            self._grow(longest + 1)
        free = [slot for slot in range(self.cache.slots) if slot not in self.live]
        taken = [(slot, self.waiting.popleft()) for slot in free[: len(self.waiting)]]
        for part in _parts(taken, self._pass_tokens):
            uniform = torch.from_numpy(np.concatenate([row.uniform(1) for _, row in part]))
            tokens, log_probabilities = self._steps.read(
                [row.sequence() for _, row in part], [slot for slot, _ in part], uniform
            )
            for (slot, row), token, value in zip(part, tokens.tolist(), log_probabilities.tolist(), strict=True):
                self.live[slot] = row
                self._add(slot, [token], [value])

    def _generate(self) -> None:
        """Add a block of tokens to the live rows."""
        left = max(self.choice.max_new_tokens - len(row.tokens) for row in self.live.values())
        steps = min(self._block, left)
        needed = max(row.length for row in self.live.values()) - 1 + steps
        if needed > self.cache.capacity:
            self._grow(needed)
        tokens = torch.zeros(self.cache.slots, dtype=torch.long)
        positions = torch.zeros(self.cache.slots, dtype=torch.long)
        uniform = np.zeros((self.cache.slots, steps))
        for slot, row in self.live.items():
            tokens[slot] = row.tokens[-1]
            positions[slot] = row.length - 1
            uniform[slot] = row.uniform(steps)
        remaining = self.cache.capacity - int(positions.max())
        chosen, log_probabilities = self._steps.block(
            tokens, positions, torch.from_numpy(uniform), steps, remaining=min(left, remaining)
        )
        columns, values = chosen.T.tolist(), log_probabilities.T.tolist()
        for slot in list(self.live):
            self._add(slot, columns[slot], values[slot])

    def _add(self, slot: int, tokens: list[int], log_probabilities: list[float]) -> None:
        """Append tokens to the row of a slot, and free the slot when the answer is whole."""
        row = self.live[slot]
        row.add(tokens, log_probabilities, self.choice)
        if row.ended:
            del self.live[slot]
            if self._progress is not None:
                self._progress(1)

    def _grow(self, needed: int) -> None:
        """Give the slots room for `needed` tokens and more. Rows for which memory is then missing wait again."""
        longest = max(len(row.prompt) for row in (*self.live.values(), *self.waiting)) + self.choice.max_new_tokens
        capacity = rounded_up(max(needed, min(2 * self.cache.capacity, longest)), GRANULE)
        allowed = self._slots_for(capacity)
        by_progress = sorted(self.live, key=lambda slot: -len(self.live[slot].tokens))
        self.waiting.extendleft(self.live[slot] for slot in by_progress[allowed:])
        rows = len(self.waiting) + min(len(self.live), allowed)
        self._move(sorted(by_progress[:allowed]), min(allowed, self.cache.slots, rows), capacity)

    def _shrink(self) -> None:
        """Drop free slots when no row waits for them, where a step's time depends on their number."""
        if self.device.type == "cpu" and not self.waiting and 0 < len(self.live) <= 0.75 * self.cache.slots:
            self._move(sorted(self.live), len(self.live), self.cache.capacity)

    def _move(self, kept: list[int], slots: int, capacity: int) -> None:
        self._steps.resize(kept, slots, capacity)
        self.live = {place: self.live[slot] for place, slot in enumerate(kept)}


def _parts(taken: list[tuple[int, Row]], tokens: int) -> Iterator[list[tuple[int, Row]]]:
    """Yield the rows in parts of at most `tokens` tokens, at least one row each."""
    part: list[tuple[int, Row]] = []
    total = 0
    for slot, row in taken:
        if part and total + row.length > tokens:
            yield part
            part, total = [], 0
        part.append((slot, row))
        total += row.length
    if part:
        yield part
