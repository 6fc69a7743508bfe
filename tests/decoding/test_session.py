"""Rows that come, go, grow and are put off in the slots of one cache still get the answers they get alone."""

from collections import deque

import numpy as np
import pytest
import torch

from ludwig_peft_plugin.decoding import decoder, session, step
from ludwig_peft_plugin.decoding.rows import Row
from ludwig_peft_plugin.model.generation import generate_answers, slot_choice

CPU = torch.device("cpu")
LONG = 40


@pytest.fixture
def llama(make_model):
    return make_model("llama")


@pytest.fixture
def expected(llama, prompts, settings, one_by_one):
    return one_by_one(llama, prompts, settings(max_new_tokens=LONG))


@pytest.fixture
def answers(llama, prompts, settings):
    """Return a function that generates for the prompts."""

    def make(batch_size=None):
        made = generate_answers(llama, prompts, settings(max_new_tokens=LONG), device=CPU, batch_size=batch_size)
        return [answer.tokens.tolist() for answer in made]

    return make


@pytest.fixture
def small_slots(monkeypatch):
    """Slots of 32 tokens at first, which most rows outgrow."""
    monkeypatch.setattr(session, "GRANULE", 32)
    monkeypatch.setattr(session, "HEADROOM", 2)


@pytest.fixture
def moves(monkeypatch):
    """What `Steps.resize` was called with: (slots before, kept, slots, capacity)."""
    seen = []
    real = step.Steps.resize

    def spy(self, kept, slots, capacity):
        seen.append((self.cache.slots, len(kept), slots, capacity))
        real(self, kept, slots, capacity)

    monkeypatch.setattr(step.Steps, "resize", spy)
    return seen


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, None])
def test_any_number_of_slots(answers, expected, batch_size):
    assert answers(batch_size) == expected


@pytest.mark.parametrize("block", [3, 8])
def test_tokens_after_an_end_are_dropped(answers, expected, monkeypatch, block):
    monkeypatch.setitem(session.BLOCK, "cpu", block)
    assert answers(3) == expected


def test_slots_grow(answers, expected, small_slots, moves):
    assert answers(3) == expected
    assert any(capacity > 32 for *_, capacity in moves)


def test_rows_that_no_longer_fit_wait(answers, expected, small_slots, moves, monkeypatch):
    monkeypatch.setattr(decoder.SlotBudget, "slots", lambda self, capacity: max(1, 128 // capacity))
    assert answers() == expected
    assert any(kept == slots < before and capacity > 32 for before, kept, slots, capacity in moves), moves


def test_slots_that_no_row_waits_for_are_dropped(answers, expected, moves):
    assert answers() == expected
    assert min(slots for _, _, slots, _ in moves) < 8


def test_when_memory_runs_out_fewer_rows_go_on(answers, expected, monkeypatch, caplog):
    real, failures = step.Steps.block, deque([8, 4])

    def block(self, *args, **kwargs):
        if failures and self.cache.slots == failures[0]:
            failures.popleft()
            raise torch.OutOfMemoryError("no memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(step.Steps, "block", block)
    assert answers() == expected
    assert not failures
    assert "going on with 4" in caplog.text
    assert "going on with 2" in caplog.text


def test_when_one_row_does_not_fit_it_is_an_error(answers, monkeypatch):
    def block(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(step.Steps, "block", block)
    with pytest.raises(torch.OutOfMemoryError):
        answers()


def test_a_recorded_step_looks_at_the_whole_slot(answers, expected, monkeypatch):
    """What a CUDA graph replays: a step over all places of the slots, recorded once for a cache."""

    class Recorded:
        def __init__(self, steps):
            self.steps, self.capacity = steps, steps.cache.capacity

        def replay(self):
            self.steps._step(self.capacity)

    def record(self):
        self._step(self.cache.capacity)  # recording runs a step first, which must leave no trace
        self._graph = Recorded(self)
        recorded.append(self.cache.slots)

    recorded = []
    monkeypatch.setattr(step.Steps, "_record", record)
    monkeypatch.setattr("ludwig_peft_plugin.model.generation.can_record", lambda base, device: True)
    assert answers(3) == expected
    assert recorded


def test_rows_of_very_different_length_do_not_share_a_cache(llama, settings):
    choice = slot_choice(llama, settings(), CPU)
    rows = [Row(index, np.ones(length, dtype=np.int32)) for index, length in enumerate([900, 20, 30, 700, 25, 10])]
    made = decoder.Decoder(llama, choice, CPU, most_slots=2)
    waiting = deque(sorted(rows, key=lambda row: -row.length))
    assert [row.index for row in made._next_rows(waiting)] == [0, 3]
    assert [row.index for row in made._next_rows(waiting)] == [2, 4, 1, 5]


def test_progress_counts_every_answer(llama, prompts, settings):
    counted = []
    generate_answers(llama, prompts, settings(), device=CPU, batch_size=3, progress=counted.append)
    assert sum(counted) == len(prompts)


def test_attention_is_put_back(llama, prompts, settings):
    before = llama.config._attn_implementation
    generate_answers(llama, prompts, settings(), device=CPU)
    assert llama.config._attn_implementation == before
