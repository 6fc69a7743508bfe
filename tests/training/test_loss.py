"""The loss of a micro-batch equals independent computations, whatever the filler, grouping and accumulation."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.data.batcher import TokenBatcher
from ludwig_peft_plugin.data.batches import IGNORED, collate, token_batches
from ludwig_peft_plugin.evaluation.metrics import TokenMetrics
from ludwig_peft_plugin.training.loss import target_loss

VOCABULARY = 97


class Rows:
    """The part of a token dataset that batches are made of."""

    def __init__(self, lengths: list[tuple[int, int]], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.sequences = [generator.integers(3, VOCABULARY, p + t).astype(np.int32) for p, t in lengths]
        self.prompt_lengths = np.array([p for p, _ in lengths], dtype=np.int32)
        self.has_targets = True
        self.input_ids = self

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.sequences[row]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) for sequence in self.sequences])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def frozen_head() -> LlamaForCausalLM:
    """As adapters train it: the output matrix stays, and only its product with hidden states is needed."""
    model = llama()
    model.lm_head.requires_grad_(False)
    return model


def gpt2() -> GPT2LMHeadModel:
    """Learned absolute positions: sensitive to where a row starts."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()


ROWS = Rows([(5, 7), (1, 20), (30, 1), (12, 12), (3, 2), (17, 9), (2, 31), (8, 8)])


def reference_loss_sum(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """One row at a time, through transformers' own labels loss."""
    total = torch.zeros(())
    for sequence, start in zip(rows.sequences, rows.prompt_lengths, strict=True):
        ids = torch.from_numpy(sequence).long()[None]
        labels = ids.clone()
        labels[:, :start] = IGNORED
        count = int((labels[:, 1:] != IGNORED).sum())
        total = total + model(input_ids=ids, labels=labels).loss * count
    return total


def step_gradient(model: torch.nn.Module, batch_size: int, accumulation: int, **how) -> tuple[float, torch.Tensor]:
    """The loss and gradient of one optimiser step over all rows."""
    model.zero_grad()
    batcher = TokenBatcher(ROWS, batch_size, accumulation=accumulation, shuffle=False, **how)
    assert batcher.steps_per_epoch == 1
    step = batcher.next_batch()
    loss = 0.0
    for part in step.micro_batches:
        result = target_loss(model, part)
        (result.loss_sum / step.target_tokens).backward()
        loss += float(result.loss_sum.detach()) / step.target_tokens
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() / other.norm() < 1e-5)


@pytest.mark.parametrize("build", [llama, frozen_head, gpt2])
def test_loss_equals_transformers_own_row_by_row(build):
    model = build()
    reference = reference_loss_sum(model, ROWS)
    result = target_loss(model, collate(ROWS, np.arange(len(ROWS))))
    torch.testing.assert_close(result.loss_sum, reference, rtol=1e-5, atol=0)
    assert int(result.row_tokens.sum()) == sum(
        len(s) - p for s, p in zip(ROWS.sequences, ROWS.prompt_lengths, strict=True)
    )


@pytest.mark.parametrize("build", [llama, frozen_head, gpt2])
def test_gradient_equals_transformers_own(build):
    model = build()
    reference_loss_sum(model, ROWS).backward()
    reference = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    target_loss(model, collate(ROWS, np.arange(len(ROWS)))).loss_sum.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert same(gradient, reference)


@pytest.mark.parametrize("build", [llama, frozen_head, gpt2])
def test_filler_changes_nothing(build):
    model = build()
    rows = np.arange(len(ROWS))
    batch = collate(ROWS, rows)
    filled = collate(ROWS, rows, length=batch.tokens + 70)
    assert len(filled.input_ids) == batch.tokens + 70
    assert filled.tokens == batch.tokens
    filled.input_ids[batch.tokens :] = 5
    for name in ("loss_sum", "row_log_likelihood", "row_tokens", "row_correct", "last_correct"):
        torch.testing.assert_close(
            getattr(target_loss(model, filled), name), getattr(target_loss(model, batch), name), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_accumulation_and_batch_composition_change_nothing(batch_size, accumulation):
    model = llama()
    loss, gradient = step_gradient(model, 8, 1)
    other_loss, other_gradient = step_gradient(model, batch_size, accumulation)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert same(other_gradient, gradient)


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"packing": True, "fixed_length": True}])
@pytest.mark.parametrize("build", [llama, frozen_head, gpt2])
def test_packed_equals_unpacked(build, how):
    """Rows that share a batch, in another order, with or without filler, are as if each were alone."""
    model = build()
    loss, gradient = step_gradient(model, 1, 8)
    other_loss, other_gradient = step_gradient(model, 1, 8, capacity=45, **how)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert same(other_gradient, gradient)


def test_a_token_budget_gives_the_same_sums():
    model = llama()
    rows = np.arange(len(ROWS))
    whole = target_loss(model, collate(ROWS, rows))
    parts = [target_loss(model, part) for part in token_batches(ROWS, rows, 40)]
    assert len(parts) > 3
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, rtol=1e-5, atol=0)
    for name in ("row_log_likelihood", "row_tokens", "row_correct", "last_correct"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(whole, name), rtol=1e-5, atol=0)


def test_metrics_are_exact_over_batches():
    model = llama()
    metrics = TokenMetrics()
    for start in range(0, len(ROWS), 3):
        metrics.update(target_loss(model, collate(ROWS, np.arange(len(ROWS))[start : start + 3])))
    values = metrics.compute("last_accuracy")
    tokens = sum(len(s) - p for s, p in zip(ROWS.sequences, ROWS.prompt_lengths, strict=True))
    assert values["loss"] == pytest.approx(float(reference_loss_sum(model, ROWS).detach()) / tokens, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))

    correct = last = whole = 0
    for sequence, start in zip(ROWS.sequences, ROWS.prompt_lengths, strict=True):
        guesses = model(input_ids=torch.from_numpy(sequence).long()[None]).logits[0, start - 1 : -1].argmax(-1)
        hits = guesses.numpy() == sequence[start:]
        correct, last, whole = correct + hits.sum(), last + hits[-1], whole + hits.all()
    assert values["token_accuracy"] == pytest.approx(correct / tokens)
    assert values["last_accuracy"] == pytest.approx(last / len(ROWS))
    assert values["sequence_accuracy"] == pytest.approx(whole / len(ROWS))


def test_accuracies_of_a_model_that_knows_the_answer():
    """A random model gets nearly nothing right, so the counts are also checked on certain logits."""
    rows = Rows([(3, 4), (2, 2)])

    class Certain(torch.nn.Module):
        config = LlamaConfig()

        def forward(self, input_ids, use_cache=False):
            following = torch.zeros(input_ids.shape, dtype=torch.int64)
            for row, sequence in enumerate(rows.sequences):
                following[row, : len(sequence) - 1] = torch.from_numpy(sequence[1:])
            logits = torch.nn.functional.one_hot(following, VOCABULARY).float() * 100
            logits[1, 2] = 0  # the second row's first target is at position 2, its last at 3
            logits[1, 2, 0] = 100
            return type("Output", (), {"logits": logits})()

    metrics = TokenMetrics()
    metrics.update(target_loss(Certain(), collate(rows, np.arange(2))))
    values = metrics.compute("last_accuracy")
    assert values["token_accuracy"] == pytest.approx(5 / 6)
    assert values["sequence_accuracy"] == pytest.approx(1 / 2)
    assert values["last_accuracy"] == pytest.approx(1 / 2)
