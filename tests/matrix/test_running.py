"""Every type on every base: without padding, with checkpointed activations, and generating many answers at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.model.generation import generate_answers

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # torch's, of FRoD
CPU = torch.device("cpu")
NEW_TOKENS = 4


@torch.no_grad()
def greedy(case: Any, model: Any, row: int) -> tuple[list[int], list[float], float]:
    """Return the most likely answer by whole forward passes, its probabilities, and how narrowly a token has won."""
    batch, _ = case.rows().alone(row)
    del batch["labels"]
    tokens, answer, chances, margin = case.texts.prompts[row].tolist(), [], [], float("inf")
    for _ in range(NEW_TOKENS):
        logits = case.called(model, **{**batch, "input_ids": torch.tensor([tokens])}).logits[0, -1]
        values, best = logits.topk(2)
        chosen, margin = int(best[0]), min(margin, float((values[0] - values[1]) / logits.abs().max()))
        if chosen == case.texts.end:
            break
        tokens.append(chosen)
        answer.append(chosen)
        chances.append(float(logits.softmax(-1)[chosen]))
    return answer, chances, margin


def test_rows_without_padding_give_the_loss_and_gradients_of_each_alone(case: Any) -> None:
    reference_loss, references = case.reference_gradients(case.attach_disturbed())
    model = case.attach_disturbed()
    loss, gradients = case.flat_gradients(model)
    case.assert_close(loss, reference_loss, "loss")
    assert gradients.keys() == references.keys()
    largest = max(float(reference.abs().max()) for reference in references.values())
    # The noise of small gradients is that of large ones; in 8 bits a rounding tips with the rows that lie beside.
    floor = max(1e-2, case.tolerance) * largest
    for name, reference in references.items():
        error = float((gradients[name] - reference).norm())
        assert error <= 5 * case.tolerance * max(float(reference.norm()), floor), name


def test_checkpointed_activations_give_the_same_gradients(case: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = case.attach_disturbed()
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        torch.manual_seed(3)  # of dropout
        found.append(case.flat_gradients(model))
    (loss, gradients), (checkpointed_loss, checkpointed) = found
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == checkpointed.keys() == case.trained(model).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_answers_of_a_batch_are_those_of_one_at_a_time(case: Any) -> None:
    model = case.attach_disturbed()
    expected = [greedy(case, model, row) for row in range(len(case.texts.prompts))]
    end = case.texts.end
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=[end], pad_token_id=end)
    batched = generate_answers(model, case.texts.prompts, config, batch_size=4, device=CPU, **case.tasks_of_answers())
    assert len({(*answer, *np.round(chances, 4)) for answer, chances, _ in expected}) > 1
    for found, (answer, chances, margin) in zip(batched, expected, strict=True):
        if margin > 4 * case.tolerance:  # rounding may decide a draw between two tokens
            assert found.tokens.tolist() == answer
            np.testing.assert_allclose(found.probabilities, chances, rtol=max(1e-3, 10 * case.tolerance))
