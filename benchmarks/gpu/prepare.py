"""Make what the runs need on this machine, once: checkpoints, rows, and what the device can do at most.

usage: python -m benchmarks.gpu.prepare MODELS DEVICE SHAPE...      (prints one JSON line; started by run.py)
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.job import GENERATION_ROWS, PREPARED, rows_file
from benchmarks.gpu.make_model import TOKENIZER, make_model
from benchmarks.gpu.measure import ceilings
from benchmarks.gpu.rows import mean_tokens, question_rows, training_rows, write_rows
from benchmarks.gpu.shapes import SHAPES

PACKAGES = ("ludwig", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "torchao", "trl", "unsloth")
ROW_LENGTHS = (0, 4096)
QUESTIONS = 256


def prepare(models: Path, device: str, shapes: list[str]) -> dict[str, Any]:
    """Write checkpoints of `shapes` and all rows below `models` and return what there is to know about the machine."""
    from transformers import AutoTokenizer

    models.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device_name(device), "versions": versions(), "checkpoints": {}, "rows": {}}
    for name in shapes:
        if name in SHAPES:
            started = time.perf_counter()
            size = make_model(SHAPES[name], models / name, device)
            seconds = round(time.perf_counter() - started, 1)
            record["checkpoints"][name] = {"written_gb": round(size / 1e9, 2), "seconds": seconds}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for length in ROW_LENGTHS:
        rows = training_rows(tokenizer, length)
        write_rows(rows, rows_file(models, length))
        mean = mean_tokens(rows, tokenizer, length or 1024)
        record["rows"][str(length)] = {"rows": len(rows), "mean_tokens": round(mean, 1)}
    write_rows(question_rows(QUESTIONS), models / f"{GENERATION_ROWS}.csv")
    if device == "cuda":
        record["ceilings"] = ceilings()
    return record


def device_name(device: str) -> str:
    """Return the device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed here."""
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


if __name__ == "__main__":
    print(PREPARED + json.dumps(prepare(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])), flush=True)
