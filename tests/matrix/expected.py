"""What the matrix must hold: every adapter type by name, and where one differs from the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QUANTIZED = ("qwen2-8-bit", "qwen2-4-bit", "qwen2-int8")
SHIPPED_QUANTIZED = ("shipped-8-bit", "shipped-4-bit")
SHIPPED = ("shipped-fp32", *SHIPPED_QUANTIZED)
SHORT = {"num_virtual_tokens": 5}
EIGHT_BIT = dict.fromkeys(("qwen2-8-bit", "shipped-8-bit"), 0.05)
"""How far a type may start from an 8-bit base by whose dequantised weights it multiplies."""


@dataclass(frozen=True)
class Expected:
    """What is expected of one type.

    Attributes:
        options: what makes it fit layers this small.
        on: further options by base.
        bases: those it trains on.
        refused: bases it cannot work on, with what the message says about the reason.
        unmergeable: bases it can be trained on and not merged into, with what the message says about the reason.
        start: for a type that does not start as its base, how far (of the largest logit) it may start from it; None
            where it starts somewhere else altogether.
        start_on: how far it may start from some bases, where it multiplies by the dequantised weight, and the
            base rounds the activations to 8 bits.
        stored: numbers in its file for each that is trained, at most.
        plain_peft: how far plain PEFT's logits may be, of the largest, where it adds up in another order than we do.
        spread: standard deviation of the noise that makes its parameters differ from how they start.
        spread_shipped: the same on the shipped base, where the usual noise would hardly show, or leave nothing of what
            the base has learned: gradients a thousand times as large show rounding alone.
    """

    options: dict[str, Any] = field(default_factory=dict)
    on: dict[str, dict[str, Any]] = field(default_factory=dict)
    bases: tuple[str, ...] = ("llama-fp32", *QUANTIZED, *SHIPPED)
    refused: dict[str, str] = field(default_factory=dict)
    unmergeable: dict[str, str] = field(default_factory=dict)
    start: float | None = None
    start_on: dict[str, float] = field(default_factory=dict)
    spread: float = 0.05
    spread_shipped: float | None = None
    stored: float = 1.0
    plain_peft: float = 0.0


TYPES: dict[str, Expected] = {
    "adalora": Expected({"orth_reg_weight": 1e-12}),  # PEFT adds this term to the loss it returns
    "adamss": Expected(),
    "adaption_prompt": Expected(
        {"adapter_layers": 2},
        plain_peft=2e-6,
        bases=("llama-fp32", "llama-8-bit", "llama-4-bit", "llama-int8", *SHIPPED),
        refused={"qwen2-fp32": "qwen2"},
    ),
    "beft": Expected(
        bases=("llama-fp32", "qwen2-fp32", *QUANTIZED, *SHIPPED),
        unmergeable=dict.fromkeys(("llama-fp32", *SHIPPED), "has no bias"),
    ),
    "bitfit": Expected(bases=("qwen2-fp32", *QUANTIZED), refused=dict.fromkeys(("llama-fp32", *SHIPPED), "bias")),
    "boft": Expected(),
    "bottleneck": Expected(),
    "c3a": Expected(),
    "cartridge": Expected(SHORT),
    "deft": Expected(start_on=EIGHT_BIT),
    "delora": Expected(),
    "dora": Expected({"r": 4}),
    "fourierft": Expected(),
    "frod": Expected(
        bases=("llama-fp32", "qwen2-fp32", "shipped-fp32"),
        refused=dict.fromkeys((*QUANTIZED, *SHIPPED_QUANTIZED), "a factor of every weight in full precision"),
    ),
    "full": Expected(
        bases=("llama-fp32", "qwen2-fp32", "shipped-fp32"),
        refused=dict.fromkeys((*QUANTIZED, *SHIPPED_QUANTIZED), "far coarser than the updates of training"),
        spread=0.01,
    ),
    "glora": Expected(start_on=EIGHT_BIT),
    "gralora": Expected(),
    "hira": Expected(),
    "hra": Expected(start_on=EIGHT_BIT),
    "ia3": Expected(),
    "layers": Expected(
        {"last": 1},
        on={base: {"last": None, "pattern": ".*norm.*|.*bias"} for base in (*QUANTIZED, *SHIPPED_QUANTIZED)},
    ),
    "lily": Expected(),
    "ln_tuning": Expected(),
    "loha": Expected(),
    "lokr": Expected(),
    "lora": Expected({"r": 4}),
    "miss": Expected({"r": 8}),
    "multitask_prompt_tuning": Expected({**SHORT, "task_column": "task", "num_tasks": 2}),
    "oft": Expected(),
    "p_tuning": Expected(SHORT),
    "peanut": Expected(),
    "prefix_tuning": Expected(SHORT),
    "prompt_tuning": Expected(SHORT),
    "psoft": Expected({"r": 8}),
    "pvera": Expected(),
    "qlora": Expected({"r": 4}),
    "randlora": Expected(spread_shipped=0.01),
    "road": Expected(),
    "shira": Expected(start_on=EIGHT_BIT, stored=3.0),  # two positions with each number
    "supertuning": Expected(start_on=EIGHT_BIT),
    "tinylora": Expected(),
    "unilora": Expected(spread_shipped=0.2),  # a number for very many places, scaled down
    "vblora": Expected(),
    "vera": Expected(),
    "waveft": Expected(spread_shipped=0.002),  # its changes are 25 times its parameters
}
"""Every registered type; one that vanishes or is added without a line here fails the matrix."""
