"""Time the training steps of the quick start under stock Ludwig and under the plugin, on the same rows, on a CPU.

usage: python benchmarks/cpu_quickstart.py [OUT.json]      (default: benchmarks/results/cpu_quickstart.json)

Each side runs in its own process, one after the other, `REPEATS` times in turn: LoRA on all linears of the shipped
Llama, the same rows in the same batches' sizes, no evaluation. The time is that of the optimiser steps after the
first `WARM_UP`, from Ludwig's own callbacks; the two sides differ only in `LUDWIG_PEFT_PLUGIN`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import provenance  # noqa: E402

STEPS, WARM_UP, BATCH, REPEATS = 40, 5, 8, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def one_side() -> None:
    """Train `STEPS` steps and print one JSON line: seconds a step and the loss of the last step."""
    import logging

    import pandas as pd
    from ludwig.api import LudwigModel
    from ludwig.callbacks import Callback

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_batch_end(self, *args: object, **kwargs: object) -> None:
            self.times.append(time.perf_counter())

    # Stock Ludwig cannot train with a tokenizer that has no beginning-of-sequence token: both sides get one.
    base = Path(tempfile.mkdtemp()) / "base"
    shutil.copytree(ROOT / "ludwig_peft_plugin" / "assets" / "tiny-llama-python", base)
    settings = base / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|endoftext|>"}))

    frame = pd.read_csv(ROOT / "datasets" / "stdlib_instructions.csv", keep_default_na=False)
    frame = frame[frame["split"] == 0].head(STEPS * BATCH).assign(split=0)
    config = {
        "model_type": "llm",
        "base_model": str(base),
        "prompt": {"template": "### Instruction: {instruction}\n### Input: {input}\n### Response:\n"},
        "input_features": [{"name": "prompt", "type": "text"}],
        "output_features": [{"name": "output", "type": "text"}],
        "adapter": {"type": "lora", "r": 16, "dropout": 0.0, "target_modules": TARGETS},
        "preprocessing": {"split": {"type": "fixed"}},
        "trainer": {
            "type": "finetune",
            "epochs": 1,
            "batch_size": BATCH,
            "learning_rate": 1e-3,
            "skip_all_evaluation": True,
        },
        "backend": {"type": "local"},
    }
    clock = Clock()
    model = LudwigModel(config, logging_level=logging.ERROR, callbacks=[clock])
    with tempfile.TemporaryDirectory() as folder:
        model.train(
            dataset=frame,
            output_directory=folder,
            skip_save_processed_input=True,
            skip_save_model=True,
            skip_save_progress=True,
            skip_save_log=True,
        )
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][WARM_UP:]
    print("RESULT " + json.dumps({"seconds_per_step": statistics.mean(steps), "steps": len(steps)}), flush=True)


def run(plugin: bool) -> dict[str, float]:
    """Run one side in a process of its own."""
    environment = {**os.environ, "LUDWIG_PEFT_PLUGIN": "1" if plugin else "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--one"], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    result: dict[str, float] = json.loads(lines[-1][len("RESULT ") :])
    return result


def main() -> None:
    """Run both sides in turn and write the ratio."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "cpu_quickstart.json"
    sides: dict[str, list[float]] = {"stock": [], "plugin": []}
    for _ in range(REPEATS):
        for side, seconds in sides.items():
            seconds.append(run(plugin=side == "plugin")["seconds_per_step"])
            print(f"{side:>6}: {seconds[-1] * 1000:.0f} ms a step", flush=True)
    best = {side: min(seconds) for side, seconds in sides.items()}
    record = {
        "what": f"LoRA r16, all linears, tiny-llama-python, batch {BATCH}, {STEPS - WARM_UP - 1} timed steps",
        "seconds_per_step": sides,
        "speedup": best["stock"] / best["plugin"],
        **provenance(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Stock Ludwig's steps take {record['speedup']:.2f} times as long as the plugin's; written to {out}")


if __name__ == "__main__":
    one_side() if "--one" in sys.argv else main()
