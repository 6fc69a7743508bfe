"""The steps of an epoch: every row once, the same in every run, resumable in the middle, alike for each grouping."""

import logging

import numpy as np
import pytest

from ludwig_peft_plugin.data.batcher import TokenBatcher
from ludwig_peft_plugin.data.batches import read_lengths

GROUPINGS = {
    "examples": {},
    "tokens": {"capacity": 64},
    "packing": {"capacity": 64, "packing": True},
    "fixed length": {"capacity": 64, "packing": True, "fixed_length": True},
}


class Rows:
    """The part of a token dataset that batches are made of."""

    has_targets = True

    def __init__(self, lengths: np.ndarray) -> None:
        self.sequences = [np.full(length, row, dtype=np.int32) for row, length in enumerate(lengths)]
        self.prompt_lengths = np.ones(len(lengths), dtype=np.int32)
        self.input_ids = self

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.sequences[row]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) for sequence in self.sequences])


ROWS = Rows(np.random.default_rng(0).integers(2, 33, 50))


@pytest.fixture(params=list(GROUPINGS))
def how(request):
    return GROUPINGS[request.param]


def epoch_of(batcher: TokenBatcher, epoch: int) -> list[list[list[int]]]:
    """The rows of each micro-batch of each step."""
    batcher.set_epoch(epoch, batcher.batch_size)
    steps = []
    while not batcher.last_batch():
        steps.append([part.rows.tolist() for part in batcher.next_batch().micro_batches])
    return steps


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_once_and_as_many_steps_in_each_epoch(how, accumulation):
    batcher = TokenBatcher(ROWS, 4, accumulation=accumulation, seed=1, **how)
    orders = []
    for epoch in range(3):
        steps = epoch_of(batcher, epoch)
        assert len(steps) == batcher.steps_per_epoch
        assert all(len(step) == accumulation for step in steps[:-1])
        orders.append([row for step in steps for part in step for row in part])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1] != orders[2]


def test_examples_are_counted_exactly():
    batcher = TokenBatcher(ROWS, 4, accumulation=3, seed=1)
    sizes = [[len(part) for part in step] for step in epoch_of(batcher, 0)]
    assert sizes == [[4, 4, 4]] * 4 + [[2]]


def test_the_same_in_every_run_and_another_with_another_seed(how):
    runs = [epoch_of(TokenBatcher(ROWS, 4, seed=seed, **how), 2) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_continues_an_epoch_in_the_middle(how):
    steps = epoch_of(TokenBatcher(ROWS, 4, accumulation=2, seed=3, **how), 5)
    resumed = TokenBatcher(ROWS, 4, accumulation=2, seed=3, skip_steps=2, **how)
    assert epoch_of(resumed, 5) == steps[2:]
    assert len(epoch_of(resumed, 6)) == len(steps)


def test_without_shuffling_rows_keep_their_order():
    for how in (GROUPINGS["examples"], GROUPINGS["tokens"]):
        steps = epoch_of(TokenBatcher(ROWS, 4, shuffle=False, **how), 7)
        assert [row for step in steps for part in step for row in part] == list(range(50))


@pytest.mark.parametrize("name", ["tokens", "packing"])
def test_a_capacity_bounds_tokens_and_fixes_who_goes_together(name):
    batcher = TokenBatcher(ROWS, 1, seed=1, **GROUPINGS[name])
    first, second = ({tuple(part) for step in epoch_of(batcher, epoch) for part in step} for epoch in range(2))
    assert first == second
    read = ROWS.lengths - 1  # the last token of a row is only predicted
    assert max(sum(read[list(part)]) for part in first) <= 64


def test_packing_needs_fewer_batches_than_taking_rows_as_they_come():
    counts = [TokenBatcher(ROWS, 1, seed=1, **GROUPINGS[name]).steps_per_epoch for name in ("tokens", "packing")]
    assert counts[1] < counts[0]


def test_without_targets_rows_are_read_whole():
    prompts = Rows(ROWS.lengths)
    prompts.has_targets = False
    part = TokenBatcher(prompts, 1, shuffle=False).make(0).micro_batches[0]
    assert part.input_ids.tolist() == prompts[0].tolist()


def test_fixed_length_makes_every_batch_as_long():
    batcher = TokenBatcher(ROWS, 1, seed=1, **GROUPINGS["fixed length"])
    parts = [batcher.make(step).micro_batches[0] for step in range(batcher.steps_per_epoch)]
    assert {len(part.input_ids) for part in parts} == {64}
    assert sum(part.tokens for part in parts) == ROWS.lengths.sum()


def test_making_a_batch_ahead_does_not_move_the_position():
    batcher = TokenBatcher(ROWS, 4, seed=1)
    batcher.set_epoch(0, 4)
    ahead = batcher.make(2)
    assert batcher.step == 0
    batches = [batcher.next_batch() for _ in range(3)]
    assert batches[2].micro_batches[0].rows.tolist() == ahead.micro_batches[0].rows.tolist()
    assert (ahead.tokens, ahead.target_tokens) == (batches[2].tokens, batches[2].target_tokens)


def test_a_larger_batch_size_in_a_later_epoch():
    batcher = TokenBatcher(ROWS, 4, seed=1)
    batcher.set_epoch(1, 8)
    assert batcher.steps_per_epoch == 7
    assert len(batcher.next_batch().micro_batches[0].rows) == 8


def test_reports_how_full_batches_are(caplog):
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        batcher = TokenBatcher(ROWS, 1, **GROUPINGS["packing"])
    share = 100 * (ROWS.lengths - 1).sum() / (64 * batcher.steps_per_epoch)
    assert caplog.messages == [
        f"packing: 50 rows in {batcher.steps_per_epoch} batches of 64 tokens, {share:.1f}% filled"
    ]


@pytest.mark.parametrize("name", ["tokens", "packing"])
def test_the_room_of_a_run_is_what_its_largest_batch_needs(name):
    batcher = TokenBatcher(ROWS, 1, seed=1, **GROUPINGS[name])
    parts = [batcher.make(step).micro_batches[0] for step in range(batcher.steps_per_epoch)]
    room = parts[0].room
    assert room.targets == max(part.target_tokens for part in parts) > 0
    assert room.sequences == max(len(part.rows) for part in parts)


def test_all_but_the_last_token_are_read_and_a_row_of_one_keeps_it():
    rows = Rows(np.array([0, 1, 2, 5]))
    assert read_lengths(rows).tolist() == [0, 1, 1, 4]
    rows.has_targets = False
    assert read_lengths(rows).tolist() == [0, 1, 2, 5]
