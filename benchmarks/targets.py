"""What the measured runs are held against: the goals, and the peers each of our runs is shown beside."""

from __future__ import annotations

from dataclasses import dataclass

TOK_S, PEAK_GIB = "tok_s", "peak_gib"
UNITS = {TOK_S: "tok/s", PEAK_GIB: "GiB"}


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        title: what is run, in a few words.
        run: key of our run.
        metric: `tok_s`, of which more is better, or `peak_gib`, of which less is better.
        goal: the value to reach, in the metric's unit; None where only a ratio counts.
        ratios: (key of another run, our value as a multiple of its) to reach.
        peers: keys of the runs that are shown beside ours.
    """

    title: str
    run: str
    metric: str
    goal: float | None = None
    ratios: tuple[tuple[str, float], ...] = ()
    peers: tuple[str, ...] = ()

    @property
    def more_is_better(self) -> bool:
        """Whether larger values are better."""
        return self.metric != PEAK_GIB


TARGETS = (
    Target(
        "8B, LoRA, bf16 base, packed",
        "8b/ours-lora-pack",
        TOK_S,
        19_000,
        ratios=(("8b/unsloth-lora-pack", 2.6),),
        peers=("8b/unsloth-lora-pack", "8b/trl-lora-pack"),
    ),
    Target("8B, LoRA, float8 base, packed", "8b/ours-lora-float8-pack", TOK_S, 28_000),
    Target(
        "8B, QLoRA, NF4 base, packed",
        "8b/ours-qlora-pack",
        TOK_S,
        18_000,
        ratios=(("8b/unsloth-qlora-pack", 2.0),),
        peers=("8b/unsloth-qlora-pack", "8b/trl-qlora-pack"),
    ),
    Target(
        "8B, DoRA, bf16 base, packed",
        "8b/ours-dora-pack",
        TOK_S,
        ratios=(("8b/ours-lora-pack", 0.75),),
        peers=("8b/trl-dora-pack",),
    ),
    Target(
        "8B, LoRA, 8 examples a step, not packed",
        "8b/ours-lora",
        TOK_S,
        6_000,
        peers=("8b/stock-lora", "8b/trl-lora"),
    ),
    Target(
        "1B, LoRA, bf16 base, packed",
        "1b/ours-lora-pack",
        TOK_S,
        110_000,
        peers=("1b/unsloth-lora-pack", "1b/trl-lora-pack"),
    ),
    Target("8B, LoRA, rows of 4,096 tokens", "8b/ours-lora-4096", TOK_S, 16_000),
    Target(
        "8B, LoRA, packed, no checkpointing: peak memory",
        "8b/ours-lora-pack",
        PEAK_GIB,
        40,
        peers=("8b/unsloth-lora-pack", "8b/trl-lora-pack"),
    ),
    Target(
        "8B, QLoRA, 2 x 2,048, checkpointing: peak memory",
        "8b/ours-qlora-2x2048",
        PEAK_GIB,
        6.3,
        peers=("8b/unsloth-qlora-2x2048", "8b/trl-qlora-2x2048"),
    ),
    Target(
        "8B, QLoRA, 2 x 2,048, checkpointing",
        "8b/ours-qlora-2x2048",
        TOK_S,
        10_000,
        peers=("8b/unsloth-qlora-2x2048", "8b/trl-qlora-2x2048"),
    ),
    Target("70B, QLoRA, checkpointing: peak memory", "70b/ours-qlora-pack", PEAK_GIB, 44),
    Target(
        "1B, evaluation with generated answers",
        "1b/ours-generate",
        TOK_S,
        ratios=(("1b/stock-generate", 10.0),),
        peers=("1b/stock-generate",),
    ),
)

CURVES = (
    ("shipped model", "tiny-llama-python/ours-lora-float8-300", "tiny-llama-python/ours-lora-bfloat16-300"),
    ("1B", "1b/ours-lora-float8-300", "1b/ours-lora-bfloat16-300"),
    ("8B", "8b/ours-lora-float8-300", "8b/ours-lora-bfloat16-300"),
)
"""Float8 runs and the bfloat16 runs of the same rows."""

CHART = (
    ("8B LoRA", ("8b/ours-lora-pack", "8b/unsloth-lora-pack", "8b/trl-lora-pack")),
    ("8B QLoRA", ("8b/ours-qlora-pack", "8b/unsloth-qlora-pack", "8b/trl-qlora-pack")),
    ("8B LoRA,\nnot packed", ("8b/ours-lora", "8b/trl-lora", "8b/stock-lora")),
)

LABELS = {
    "ours": "this plugin",
    "plain": "this plugin, plain layers",
    "unsloth": "Unsloth",
    "trl": "TRL + Liger",
    "stock": "stock Ludwig",
}


def label(key: str) -> str:
    """Return whose run `key` is, in words."""
    return LABELS[key.split("/")[1].split("-")[0]]
