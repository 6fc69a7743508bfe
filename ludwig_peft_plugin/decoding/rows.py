"""One prompt on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ludwig_peft_plugin.decoding.choice import Choice

DRAWS = 64  # numbers drawn at once


@dataclass
class Row:
    """One prompt and what has been generated for it.

    Attributes:
        index: which of the prompts it is.
        prompt: its tokens, shape (n,); at least one.
        random: where its sampled tokens come from; None for a greedy search.
        tokens: the answer so far, without the token that ends it.
        log_probabilities: of each of them, by the model itself.
        ended: whether the answer is whole.
    """

    index: int
    prompt: np.ndarray
    random: np.random.Generator | None = None
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: bool = False
    _draws: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    def sequence(self) -> Tensor:
        """Return prompt and answer so far, shape (length,), int64."""
        return torch.from_numpy(np.concatenate([self.prompt.astype(np.int64), np.array(self.tokens, dtype=np.int64)]))

    def uniform(self, count: int) -> np.ndarray:
        """Return the numbers in [0, 1) that choose the next `count` tokens, the same ones at each call."""
        if self.random is None:
            return np.zeros(count)
        start, end = len(self.tokens), len(self.tokens) + count
        while len(self._draws) < end:
            self._draws = np.concatenate([self._draws, self.random.random(DRAWS)])
        return self._draws[start:end]

    def add(self, tokens: list[int], log_probabilities: list[float], choice: Choice) -> None:
        """Append tokens until the answer ends; what follows is dropped."""
        for token, log_probability in zip(tokens, log_probabilities, strict=True):
            if token in choice.ends:
                self.ended = True
                return
            self.tokens.append(token)
            self.log_probabilities.append(log_probability)
            if len(self.tokens) >= choice.max_new_tokens:
                self.ended = True
                return
