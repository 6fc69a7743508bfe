"""Compare LoRA with full fine-tuning of a small BERT that classifies functions of the standard library, on a CPU.

usage: python benchmarks/encoder_lora.py [OUT.json]      (default: benchmarks/results/encoder_lora.json)

Both sides are ordinary Ludwig runs of one config that differ in the encoder's `adapter` and in the learning rate. It is
chosen for each from as many values, by the mean accuracy on the validation rows over `SWEEP_SEEDS`; then each side is
trained with `SEEDS` and measured on the test rows, which nothing was chosen by. Results are written after every run,
and a run that is in the file already is not repeated: delete the file to start over.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]

from benchmarks.record import provenance  # noqa: E402

BERT = ROOT / "ludwig_peft_plugin" / "assets" / "tiny-bert-python"
TRAIN_ROWS, EPOCHS, BATCH, LENGTH = 4000, 3, 32, 32
SEEDS, SWEEP_SEEDS = (1, 2, 3, 4, 5), (100, 101, 102)
# The update of an embedding is a row of A times B, and B starts with a variance of 1: there the scaling is a small one.
LORA = {
    "type": "lora",
    "r": 4,
    "alpha": 16,
    "dropout": 0.1,
    "target_modules": ["query", "key", "value", "dense", "word_embeddings"],
    "rank_pattern": {"word_embeddings": 3},
    "alpha_pattern": {"word_embeddings": 1},
}
SIDES: dict[str, dict[str, Any]] = {
    "lora": {"rates": [2.5e-3, 5e-3, 1e-2], "encoder": {"adapter": LORA}},
    "full": {"rates": [5e-4, 1e-3, 2e-3], "encoder": {"trainable": True}},
}
GOAL_POINTS, GOAL_SHARE = 0.4, 0.036


def table() -> pd.DataFrame:
    """Train rows up to `TRAIN_ROWS`, all validation and test rows."""
    from make_stdlib_areas import TRAIN, all_rows, library_sources

    frame = pd.DataFrame(all_rows(library_sources()))[["code", "area", "split"]]
    kept = frame[frame["split"] == TRAIN].head(TRAIN_ROWS)
    return pd.concat([kept, frame[frame["split"] != TRAIN]], ignore_index=True)


def config(side: str, rate: float) -> dict[str, Any]:
    """The Ludwig config of one run."""
    encoder = {"type": "bert", "pretrained_model_name_or_path": str(BERT), "reduce_output": "mean"}
    return {
        "input_features": [
            {
                "name": "code",
                "type": "text",
                "preprocessing": {"max_sequence_length": LENGTH},
                "encoder": encoder | SIDES[side]["encoder"],
            }
        ],
        "output_features": [{"name": "area", "type": "category"}],
        "combiner": {"type": "concat"},
        "preprocessing": {"split": {"type": "fixed"}},
        "trainer": {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "eval_batch_size": 256,
            "learning_rate": rate,
            "learning_rate_scheduler": {"decay": "linear", "warmup_fraction": 0.1},
            "skip_all_evaluation": True,
        },
        "backend": {"type": "local"},
    }


def run(side: str, rate: float, seed: int, frame: pd.DataFrame) -> dict[str, Any]:
    """Train once and return accuracies in percent, the trained share of the parameters and the seconds."""
    from ludwig.api import LudwigModel

    from ludwig_peft_plugin.register import register

    register()
    model = LudwigModel(config(side, rate), logging_level=logging.ERROR)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model.train(
            dataset=frame,
            output_directory=folder,
            random_seed=seed,
            skip_save_processed_input=True,
            skip_save_model=True,
            skip_save_progress=True,
            skip_save_log=True,
        )
    parameters = list(model.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    seconds = time.perf_counter() - started
    result = {"side": side, "rate": rate, "seed": seed, "share": trained / total, "trained": trained, "total": total}
    for name, split in (("validation", 1), ("test", 2)):
        rows = frame[frame["split"] == split].reset_index(drop=True)
        predicted, _ = model.predict(dataset=rows, skip_save_predictions=True)
        result[name] = 100 * float((predicted["area_predictions"].to_numpy() == rows["area"].to_numpy()).mean())
    return result | {"seconds": round(seconds, 1)}


def chosen_rate(side: str, runs: list[dict[str, Any]]) -> float:
    """The learning rate with the best mean validation accuracy of the sweep."""
    found: dict[float, list[float]] = {}
    for entry in runs:
        if entry["side"] == side and entry["seed"] in SWEEP_SEEDS:
            found.setdefault(entry["rate"], []).append(entry["validation"])
    return max(found, key=lambda rate: statistics.mean(found[rate]))


def summary(runs: list[dict[str, Any]], frame: pd.DataFrame) -> dict[str, Any]:
    """What is reported: accuracies by seed at the chosen rates, their means, and whether the goals are reached."""
    sides = {}
    for side in SIDES:
        rate = chosen_rate(side, runs)
        chosen = {e["seed"]: e for e in runs if e["side"] == side and e["rate"] == rate and e["seed"] in SEEDS}
        accuracies = [round(chosen[seed]["test"], 3) for seed in SEEDS]
        sides[side] = {
            "learning_rate": rate,
            "test_accuracy_by_seed": accuracies,
            "mean": round(statistics.mean(accuracies), 3),
            "standard_deviation": round(statistics.stdev(accuracies), 3),
            "trained_parameters": chosen[SEEDS[0]]["trained"],
            "all_parameters": chosen[SEEDS[0]]["total"],
            "trained_share": round(chosen[SEEDS[0]]["share"], 5),
            "seconds_of_training": [chosen[seed]["seconds"] for seed in SEEDS],
        }
    gap = round(sides["full"]["mean"] - sides["lora"]["mean"], 3)
    return {
        "rows": {
            name: int((frame["split"] == split).sum()) for name, split in (("train", 0), ("validation", 1), ("test", 2))
        },
        "classes": int(frame["area"].nunique()),
        "most_common_class": round(
            100 * float(frame[frame["split"] == 2]["area"].value_counts(normalize=True).max()), 2
        ),
        "sides": sides,
        "full_minus_lora_points": gap,
        "goal": f"LoRA trains at most {GOAL_SHARE:.1%} of the parameters and is at most {GOAL_POINTS} points below",
        "reached": gap <= GOAL_POINTS and sides["lora"]["trained_share"] <= GOAL_SHARE,
    }


def main() -> None:
    """Run what is missing, and write the file after every run."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "encoder_lora.json"
    os.environ["HF_HUB_OFFLINE"] = "1"
    frame = table()
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.exists() else []

    def ensure(side: str, rate: float, seed: int) -> None:
        if any((e["side"], e["rate"], e["seed"]) == (side, rate, seed) for e in runs):
            return
        runs.append(run(side, rate, seed, frame))
        print(runs[-1], flush=True)
        write({"runs": runs})

    def write(content: dict[str, Any]) -> None:
        out.write_text(json.dumps(content, indent=1) + "\n")

    for side, setup in SIDES.items():
        for rate in setup["rates"]:
            for seed in SWEEP_SEEDS:
                ensure(side, rate, seed)
    for seed in SEEDS:
        for side in SIDES:
            ensure(side, chosen_rate(side, runs), seed)
    report = {
        "what": f"areas of the standard library from {LENGTH} tokens of code; 2-layer BERT, {EPOCHS} epochs of {BATCH}",
        **summary(runs, frame),
        **provenance(("ludwig", "torch", "transformers", "peft")),
        "runs": runs,
    }
    write(report)
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
