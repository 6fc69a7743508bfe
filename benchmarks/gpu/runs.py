"""The runs that are measured: which tool trains what, on which rows, for how many steps; and the suites of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
WARM_UP_FRACTION = 0.1  # of the steps, linear; then a cosine to zero
MAX_GRADIENT_NORM = 1.0
SEED = 42

LEAN = {
    "trainer.checkpoint_offload": True,
    "trainer.embedding_offload": True,
    "trainer.optimizer": {"type": "paged_adamw_8bit"},
}
"""What the memory runs of ours add to gradient checkpointing."""

OURS, PLAIN, STOCK, TRL, UNSLOTH = "ours", "plain", "stock", "trl", "unsloth"
PLAIN_STEPS = 8


@dataclass(frozen=True)
class Run:
    """One tool, one setting; a process of its own.

    Attributes:
        name: unique within the shape.
        tool: `ours`; `plain`, which is ours with transformers' and PEFT's own layers; `stock` Ludwig; `trl`; `unsloth`.
        shape: name in `SHAPES`, or a base model that Ludwig knows (only for `ours`).
        kind: `train`, or `generate`: evaluate with generated answers.
        batch: rows of a step, or with `packing` rows of `length` tokens that are filled.
        row_length: what `rows.training_rows` takes.
        warm_up: steps before the timed ones.
        stop: steps after which to stop; the schedule of the learning rate stays that of `warm_up + steps`.
        prompts: how many of them `generate` answers.
        reference: the run whose loss curve this one's must agree with.
        overrides: entries of the Ludwig config, by dotted name (only for `ours`).
        switched_off: environment variables of the engine that are 0 (only for `ours`).
        timeout: seconds from when it may begin.
    """

    name: str
    tool: str
    shape: str
    method: str = "lora"
    kind: str = "train"
    packing: bool = False
    batch: int = 8
    length: int = 1024
    row_length: int = 0
    float8: bool = False
    checkpointing: bool = False
    warm_up: int = 8
    steps: int = 16
    stop: int | None = None
    prompts: int = 0
    reference: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    switched_off: tuple[str, ...] = ()
    timeout: int = 150

    @property
    def key(self) -> str:
        """Unique name: `shape/name`."""
        return f"{self.shape}/{self.name}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def _plain(run: Run) -> Run:
    """Return the run that `run` is compared with: the same rows and schedule, the first steps of it, in float32.

    In bfloat16 the plain layers would differ from the truth more than ours, which round in fewer places. Without
    checkpointing, activations in float32 fit no GPU.
    """
    name, precision = run.name.replace("ours", "plain", 1), {"precision": "float32"}
    return replace(
        run, name=name, tool=PLAIN, stop=PLAIN_STEPS, reference=None, overrides=precision, checkpointing=True
    )


def _packed(tool: str, shape: str, method: str = "lora", **changes: Any) -> Run:
    defaults = {"name": f"{tool}-{method}-pack", "packing": True}
    if tool == OURS:
        defaults["reference"] = f"plain-{method}-pack"
    return Run(**{**defaults, "tool": tool, "shape": shape, "method": method, **changes})


def _checkpointed(tool: str, shape: str = "8b") -> Run:
    """Return the memory run: 2 packed rows of 2,048 tokens, gradient checkpointing."""
    changes = {"name": f"{tool}-qlora-2x2048", "batch": 2, "length": 2048, "checkpointing": True}
    if tool == OURS:
        changes |= {"reference": "plain-qlora-2x2048", "overrides": LEAN}
    return _packed(tool, shape, "qlora", **changes)


def _plain_runs(runs: list[Run]) -> list[Run]:
    """Return one plain run for each reference that `runs` name and that is a plain run."""
    found = {run.reference: _plain(run) for run in runs if run.reference and not run.float8}
    return [run for run in found.values() if run.name in found]


def _curve(shape: str, float8: bool) -> Run:
    """Return 300 steps of the packed LoRA, in bfloat16 or float8."""
    name = f"ours-lora-{'float8' if float8 else 'bfloat16'}-300"
    reference = "ours-lora-bfloat16-300" if float8 else None
    precision = {} if float8 else {"precision": "bfloat16"}
    return Run(
        name, OURS, shape, packing=True, float8=float8, reference=reference, steps=292, timeout=240, overrides=precision
    )


def _control(shape: str) -> Run:
    """Return the bfloat16 curve with another attention kernel, which differs in nothing but rounding.

    Steps of a model amplify differences. How far two bfloat16 curves part says what of a float8 curve's is its own.
    """
    name, kernel = "ours-lora-bfloat16-300-control", ("LUDWIG_PEFT_SHORT_ATTENTION",)
    return replace(_curve(shape, float8=False), name=name, switched_off=kernel)


def _generation(tool: str, shape: str, prompts: int) -> Run:
    return Run(f"{tool}-generate", tool, shape, kind="generate", batch=1, prompts=prompts, warm_up=1, steps=1)


_LONG = Run("ours-lora-4096", OURS, "8b", batch=2, length=4096, row_length=4096, reference="plain-lora-4096")
_8B_OURS = [
    _packed(OURS, "8b"),
    _packed(OURS, "8b", name="ours-lora-float8-pack", float8=True, reference="ours-lora-pack"),
    _packed(OURS, "8b", "qlora"),
    _packed(OURS, "8b", "dora"),
    # Batches of many sizes: a CUDA graph of each is made when it comes again, so it takes longer to be steady.
    Run("ours-lora", OURS, "8b", warm_up=64, steps=64, reference="plain-lora"),
    _LONG,
    _checkpointed(OURS),
]
_1B_OURS = [_packed(OURS, "1b")]

SUITES: dict[str, list[Run]] = {
    "8b": [
        *_8B_OURS,
        _packed(UNSLOTH, "8b"),
        _packed(UNSLOTH, "8b", "qlora"),
        _packed(TRL, "8b"),
        _packed(TRL, "8b", "qlora"),
        Run("trl-lora", TRL, "8b"),
        Run("stock-lora", STOCK, "8b", warm_up=3, steps=8, timeout=240),
        _packed(TRL, "8b", "dora", warm_up=3, steps=8, timeout=200),
        _checkpointed(UNSLOTH),
        _checkpointed(TRL),
    ],
    "8b-plain": _plain_runs(_8B_OURS),
    "1b": [*_1B_OURS, *_plain_runs(_1B_OURS), _packed(UNSLOTH, "1b"), _packed(TRL, "1b")],
    "70b": [
        _packed(
            OURS,
            "70b",
            "qlora",
            batch=1,
            checkpointing=True,
            warm_up=2,
            steps=6,
            timeout=300,
            reference=None,
            overrides=LEAN,
        ),
    ],
    "generate": [_generation(OURS, "1b", 256), _generation(STOCK, "1b", 8)],
    "float8": [_curve(shape, float8) for shape in ("tiny-llama-python", "1b") for float8 in (False, True)],
    "float8-8b": [_curve("8b", float8=False), _control("8b"), _curve("8b", float8=True)],
    # For trying the harness out, also on a CPU.
    "tiny": [
        Run("ours-lora", OURS, "tiny", warm_up=2, steps=6, reference="plain-lora"),
        Run("plain-lora", PLAIN, "tiny", warm_up=2, steps=6),
        Run("ours-qlora", OURS, "tiny-nf4", method="qlora", warm_up=2, steps=6),
        Run("stock-lora", STOCK, "tiny", warm_up=2, steps=6),
        _generation(OURS, "tiny", 8),
        _generation(STOCK, "tiny", 2),
    ],
    "tiny-packed": [
        _packed(OURS, "tiny", warm_up=2, steps=6),
        _packed(PLAIN, "tiny", warm_up=2, steps=6),
        _packed(TRL, "tiny", warm_up=2, steps=6),
        Run("trl-lora", TRL, "tiny", warm_up=2, steps=6),
    ],
}


def select(suites: list[str], names: list[str] | None = None) -> list[Run]:
    """Return the runs of `suites`, or those of them that `names` (with or without shape) list, in that order.

    Raises:
        KeyError: there is no such suite or run.
    """
    runs = {run.key: run for suite in suites for run in SUITES[suite]}
    if names is None:
        return list(runs.values())
    chosen = []
    for name in names:
        found = [run for run in runs.values() if name in (run.key, run.name)]
        if not found:
            raise KeyError(f"no run {name!r}; there are {', '.join(runs)}")
        chosen += found
    return chosen
