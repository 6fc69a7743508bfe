"""Sizes of CUDA graphs: what a recorded list of kernels fixes, rounded up so that few graphs serve all batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.attention import LONGEST_SHORT
from ludwig_peft_plugin.rounding import rounded_up


@dataclass(frozen=True)
class Size:
    """What is fixed in a graph: tokens, sequences, the longest sequence and how many tokens' states are wanted."""

    tokens: int
    sequences: int
    max_length: int
    targets: int

    @classmethod
    def of(cls, batch: MicroBatch) -> Size:
        """Return the size `batch` is brought up to."""
        tokens, sequences = len(batch.input_ids), len(batch.cu_seqlens) - 1
        if tokens == sequences * batch.max_length:  # equal lengths have an attention of their own; leave them so
            return cls(tokens, sequences, batch.max_length, _share(batch.target_tokens, tokens))
        room = batch.room
        longest, targets = batch.max_length, batch.target_tokens
        if room is not None and tokens > 0.75 * room.tokens:
            sequences, tokens = max(sequences, room.sequences), max(tokens, room.tokens)
            longest, targets = max(longest, room.max_length), max(targets, room.targets)
        step = max(64, 1 << max(0, (tokens - 1).bit_length() - 5))
        total = rounded_up(tokens, step)
        longest = max(longest, total - len(batch.input_ids))  # what is left over is one more sequence
        targets = _share(targets, total) if room is None else min(rounded_up(targets, 64), total)
        # The kernel for short sequences does not ask how long the longest is.
        longest = LONGEST_SHORT if longest <= LONGEST_SHORT else rounded_up(longest, 128)
        return cls(total, rounded_up(sequences + 1, 8), longest, targets)._uneven()

    @property
    def is_even(self) -> bool:
        """Whether all sequences are equally long."""
        return self.tokens == self.sequences * self.max_length

    def holds(self, other: Size) -> bool:
        """Return whether a batch of another size can run in a graph of this one, at little more cost."""
        if not self.resembles(other) or self.targets < other.targets:
            return False
        return self.sequences >= other.sequences and self.max_length >= other.max_length

    def resembles(self, other: Size) -> bool:
        """Return whether one graph can serve both sizes: as many tokens, attended in the same way."""
        if self.tokens != other.tokens:
            return False
        if self.is_even or other.is_even:
            return (self.sequences, self.max_length) == (other.sequences, other.max_length)
        return True

    def joined(self, other: Size) -> Size:
        """Return the size that holds both of two that resemble each other."""
        sequences, max_length = max(self.sequences, other.sequences), max(self.max_length, other.max_length)
        size = Size(self.tokens, sequences, max_length, max(self.targets, other.targets))
        return size if self.is_even else size._uneven()

    def _uneven(self) -> Size:
        """Return a size that does not look like one of equally long sequences, as which it would be attended."""
        return replace(self, sequences=self.sequences + 8) if self.is_even else self


def _share(targets: int, tokens: int) -> int:
    """Return `targets` rounded up to quarters of the tokens: few graphs for batches of which none knows the next."""
    return min(tokens, rounded_up(targets, max(1, tokens // 4)))
