"""The next token: the likeliest or one drawn, with the probability the model itself gives it."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from ludwig_peft_plugin.decoding.choice import Choice, choose
from ludwig_peft_plugin.decoding.rows import Row
from ludwig_peft_plugin.model.generation import generate_answers

CPU = torch.device("cpu")


def choice(*processors, sample=True):
    return Choice(LogitsProcessorList(processors), sample, frozenset({0}), 10)


def test_a_greedy_choice_is_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    tokens, log_probabilities = choose(logits, choice(sample=False), torch.zeros(2).double())
    assert tokens.tolist() == [1, 0]
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, expected)


def test_drawn_tokens_follow_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = (torch.arange(10_000).double() + 0.5) / 10_000
    tokens, _ = choose(probabilities.log().expand(10_000, -1), choice(), uniform)
    np.testing.assert_allclose(np.bincount(tokens.numpy(), minlength=4) / 10_000, probabilities, atol=1e-3)


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_range_draw_possible_tokens(draw):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    tokens, _ = choose(logits, choice(), torch.tensor([draw]).double())
    assert tokens.item() == (1 if draw == 0 else 2)


def test_processors_change_what_is_drawn_but_not_the_probability():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    before = logits.clone()
    uniform = torch.tensor([0.01]).double()
    tokens, log_probabilities = choose(logits, choice(TemperatureLogitsWarper(0.5), TopKLogitsWarper(1)), uniform)
    assert tokens.item() == 2
    torch.testing.assert_close(log_probabilities, before.log_softmax(-1)[:, 2])
    assert torch.equal(logits, before)


def test_a_rows_numbers_are_its_own_and_stay():
    row, again = (Row(3, np.ones(2), np.random.default_rng((5, 3))) for _ in range(2))
    first = row.uniform(2)
    assert row.uniform(2).tolist() == first.tolist()  # asked again after a block that did not count
    row.add([4, 4], [0.0, 0.0], choice())
    assert [*first, *row.uniform(100)] == again.uniform(102).tolist()


def test_sampled_answers_do_not_depend_on_the_batch(make_model, prompts, settings):
    model, config = make_model(), settings(do_sample=True, temperature=2.0, top_k=20, top_p=0.95, max_new_tokens=20)
    runs = []
    for batch_size in (1, 3, None):
        torch.manual_seed(0)
        runs.append(generate_answers(model, prompts, config, device=CPU, batch_size=batch_size))
    texts = [[answer.tokens.tolist() for answer in run] for run in runs]
    assert texts[0] == texts[1] == texts[2]
    torch.manual_seed(1)
    other = generate_answers(model, prompts, config, device=CPU)
    assert [answer.tokens.tolist() for answer in other] != texts[0]
