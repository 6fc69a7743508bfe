"""Compare what was written with the trained model, by their logits on a few prompts.

The trained model and the loaded export run on the same token ids, one prompt at a time, without dropout. Quantised
layers multiply with their dequantised weights and do not round activations (`weight_only_forward`), because a plain
model cannot repeat that rounding.

The measure is the largest difference of a logit in units of the standard deviation of the trained model's logits.
Logits scale with the model, so an absolute bound would mean something else for each one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.data.tokens import encode_prompts
from ludwig_peft_plugin.engine.virtual_tokens import needs_tasks
from ludwig_peft_plugin.export.result import Comparison
from ludwig_peft_plugin.model.dequantize import weight_only_forward

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Default largest difference, by the coarser of the stored dtype and the one computed in."""

MAX_TOKENS = 256
MAX_PROMPTS = 4
FIXED_PROMPTS = (
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef variance(values):\n",
    "The three primary colours are red, yellow and blue. Mixing red and yellow gives orange, mixing",
    "### Instruction: Write a function that reverses a list.\n### Response: ",
    "In 1969, two people walked on the Moon for the first time. 12 + 30 = 42, and 42 - 30 =",
)
"""Used when no prompts of the dataset are given."""


def default_tolerance(*dtypes: torch.dtype) -> float:
    """Return the default tolerance of a comparison that involves these dtypes."""
    return max(TOLERANCES[dtype] for dtype in dtypes)


def prompt_tokens(llm: Any, prompts: Sequence[str] | None) -> list[Tensor]:
    """Return the token ids, each of shape (1, length), of the prompts to compare on, cut to at most 256 tokens."""
    chosen = [prompt for prompt in prompts or [] if prompt][:MAX_PROMPTS] or list(FIXED_PROMPTS)
    rows = encode_prompts(llm.tokenizer, chosen)
    limit = min(MAX_TOKENS, llm.context_len or MAX_TOKENS)
    return [torch.from_numpy(rows[row][-limit:]).long().unsqueeze(0) for row in range(len(rows))]


def logits_of(model: nn.Module, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return the model's logits for each prompt, shape (length, vocabulary), float32 on the CPU.

    A model with a prompt for each task is asked as the tasks in turn, until each prompt and each task has had its turn.
    The model's training flags are as they were afterwards, and no random number is drawn.
    """
    device = next(model.parameters()).device
    with _evaluating(model), weight_only_forward(model), torch.no_grad():
        return [
            model(
                input_ids=ids.to(device),
                attention_mask=torch.ones_like(ids, device=device),
                use_cache=False,
                **({} if task is None else {"task_ids": torch.tensor([task], device=device)}),
            )
            .logits[0]
            .float()
            .cpu()
            for ids, task in _with_tasks(model, tokens)
        ]


def _with_tasks(model: Any, tokens: Sequence[Tensor]) -> list[tuple[Tensor, int | None]]:
    """Return prompts and the tasks to ask them as, None for a model without; each prompt and each task is there."""
    if not needs_tasks(model):
        return [(ids, None) for ids in tokens]
    tasks = int(model.active_peft_config.num_tasks)
    return [(tokens[turn % len(tokens)], turn % tasks) for turn in range(max(len(tokens), tasks))]


def compare(trained: Sequence[Tensor], exported: Sequence[Tensor]) -> Comparison:
    """Compare logits, each of shape (length, vocabulary).

    A logit that is not finite on one side counts as an infinite difference.
    """
    largest = divergence = 0.0
    tokens = 0
    for reference, other in zip(trained, exported, strict=True):
        difference = float((other - reference).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += reference.shape[0]
    deviation = float(torch.cat([reference.flatten() for reference in trained]).double().std(correction=0))
    return Comparison(
        max_abs_difference=largest,
        relative_difference=largest / deviation if deviation else largest,
        mean_kl=max(divergence / tokens, 0.0) if math.isfinite(divergence) else math.inf,
        tokens=tokens,
    )


def verification_device(live: torch.device, needed_bytes: int) -> torch.device:
    """Return where to load an export for its verification: beside the trained model if it fits, else in main memory."""
    if live.type != "cuda":
        return live
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(live)
    if free > 1.3 * needed_bytes + 2**30:
        return live
    logger.info("The export does not fit beside the trained model on %s; it is verified on the CPU.", live)
    return torch.device("cpu")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and give every module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
