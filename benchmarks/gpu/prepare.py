"""Make what the runs need on this machine, once: checkpoints, rows, and what the device can do at most.

usage: python -m benchmarks.gpu.prepare MODELS DEVICE SHAPE...      (prints one JSON line; started by run.py)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import GENERATION_ROWS, PREPARED, rows_file
from benchmarks.gpu.make_model import TOKENIZER, make_model
from benchmarks.gpu.measure import ceilings
from benchmarks.gpu.rows import mean_tokens, question_rows, training_rows, write_rows
from benchmarks.gpu.shapes import SHAPES
from benchmarks.record import PACKAGES, provenance

PEERS = ("liger-kernel", "torchao", "trl", "unsloth")
ROW_LENGTHS = (0, 4096)
QUESTIONS = 256


def prepare(models: Path, device: str, shapes: list[str]) -> dict[str, Any]:
    """Write checkpoints of `shapes` and all rows below `models` and return what there is to know about the machine."""
    from transformers import AutoTokenizer

    models.mkdir(parents=True, exist_ok=True)
    where = provenance((*PACKAGES, *PEERS), device)
    record: dict[str, Any] = {**where, "checkpoints": {}, "rows": {}}
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


if __name__ == "__main__":
    print(PREPARED + json.dumps(prepare(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])), flush=True)
