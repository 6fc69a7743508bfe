"""Generate answers for any number of prompts, as many at once as fit into memory."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ludwig_peft_plugin.decoding.attention import slot_attention
from ludwig_peft_plugin.decoding.choice import Choice
from ludwig_peft_plugin.decoding.memory import SlotBudget
from ludwig_peft_plugin.decoding.rows import Row
from ludwig_peft_plugin.decoding.session import Session, first_capacity

logger = logging.getLogger(__name__)


class Decoder:
    """Generates with a transformers model whose attention `engine.transformers_attention` knows.

    Attributes:
        most_slots: a bound on the rows at once besides that of memory; lowered when memory runs out all the same.
    """

    def __init__(
        self, base: Any, choice: Choice, device: torch.device, *, most_slots: int | None = None, graphs: bool = False
    ) -> None:
        self.base = base
        self.choice = choice
        self.device = device
        self.graphs = graphs
        self.most_slots = most_slots
        self._budget = SlotBudget(base, device)

    @torch.no_grad()
    def run(self, rows: list[Row], progress: Callable[[int], None] | None = None) -> None:
        """Fill in the answers of `rows`; a row's answer does not depend on the others.

        Without gradients, but not in inference mode: what quantised layers keep from their first pass would then be of
        no use to training, and it saves no measurable time.

        Raises:
            torch.OutOfMemoryError: not even a single row fits.
        """
        waiting = deque(sorted(rows, key=lambda row: -row.length))
        with slot_attention(self.base):
            while waiting:
                left = self._attempt(self._next_rows(waiting), progress)
                waiting.extendleft(sorted(left, key=lambda row: row.length))
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _attempt(self, rows: list[Row], progress: Callable[[int], None] | None) -> list[Row]:
        """Generate for rows that share a cache; return those that memory was missing for, to be tried again."""
        session = Session(self.base, self.choice, self.device, rows, self.slots, graphs=self.graphs, progress=progress)
        try:
            session.run()
        except torch.OutOfMemoryError:
            slots = session.cache.slots
            if slots <= 1:
                raise
            self.most_slots = slots // 2
            logger.warning("Memory ran out with %d answers at once; going on with %d.", slots, self.most_slots)
        return [row for row in rows if not row.ended]

    def slots(self, capacity: int) -> int:
        """Return how many slots of `capacity` tokens there may be."""
        slots = self._budget.slots(capacity)
        return slots if self.most_slots is None else min(slots, self.most_slots)

    def _next_rows(self, waiting: deque[Row]) -> list[Row]:
        """Take the rows that share a cache: all if they fit in at once, else at least those of similar length."""
        capacity = first_capacity(waiting[0], self.choice)
        slots = self.slots(capacity)
        taken: list[Row] = []
        while waiting and (len(taken) < slots or 2 * first_capacity(waiting[0], self.choice) > capacity):
            taken.append(waiting.popleft())
        return taken
