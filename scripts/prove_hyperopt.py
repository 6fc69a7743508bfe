"""Search over adapter types with both of Ludwig's executors on the shipped model, and check what came of each trial.

Needs the extra `hyperopt`; `make hyperopt` runs it in an environment of its own, a few minutes on two CPU cores.
Usage: prove_hyperopt.py FOLDER (results go there)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = {0: 64, 1: 16, 2: 16}  # of the splits training, validation and test
SECTIONS = [
    {"type": "lora", "r": 4, "target_modules": "all-linear"},
    {"type": "dora", "r": 8},
    {"type": "ia3"},
]
RAY = {"type": "ray", "num_samples": 1, "cpu_resources_per_trial": 1, "gpu_resources_per_trial": 0}
RATE = {"space": "loguniform", "lower": 1e-3, "upper": 1e-2}
SINGLE = {
    "adapter.type": {"space": "grid_search", "values": ["lora", "dora", "ia3"]},
    "adapter.r": {"space": "choice", "categories": [2, 6]},
    "trainer.learning_rate": RATE,
}
"""The config's own type is lora, so that `dora` must lose its options and `ia3` must lose `r` as well."""

SEARCHES: dict[str, dict[str, Any]] = {
    "ray_sections": {
        "executor": RAY,
        "parameters": {"adapter": {"space": "grid_search", "values": SECTIONS}, "trainer.learning_rate": RATE},
    },
    # Trials that fall behind are stopped after an epoch; Ludwig evaluates those from what Ray has kept of them.
    "ray_single_options": {
        "executor": {
            **RAY,
            "scheduler": {"type": "async_hyperband", "max_t": 3, "grace_period": 1, "reduction_factor": 2},
        },
        "parameters": SINGLE,
        "epochs": 3,
    },
    "optuna_single_options": {
        "executor": {"type": "optuna", "num_samples": 3, "sampler": "random"},
        "parameters": SINGLE,
    },
}


def small_dataset(path: Path) -> None:
    """Write short rows of each split of the shipped dataset."""
    rows = pd.read_csv(REPOSITORY / "datasets" / "stdlib_instructions.csv")
    length = rows[["instruction", "input", "output"]].fillna("").map(len).sum(axis=1)
    rows = rows.loc[length.sort_values(kind="stable").index]
    pd.concat([rows[rows["split"] == split].head(4 * count)[::4] for split, count in ROWS.items()]).to_csv(
        path, index=False
    )


def search_config(dataset: Path, search: dict[str, Any]) -> dict[str, Any]:
    """Return the shipped search on other data, with another executor and other parameters."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "hyperopt_methods.yaml").read_text("utf-8"))
    config["dataset"] = str(dataset)
    config["adapter"] = {"type": "lora", "dropout": 0.1, "target_modules": "all-linear"}
    config["trainer"]["epochs"] = search.get("epochs", 1)
    config["generation"]["max_new_tokens"] = 8
    config["hyperopt"] |= {"executor": search["executor"], "parameters": search["parameters"]}
    return config


def expected_adapter(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a trial's adapter must have been trained with."""
    if "adapter" in parameters:
        return dict(parameters["adapter"])
    kind = parameters["adapter.type"]
    options = {} if kind == "ia3" else {"r": parameters["adapter.r"]}
    return {"type": kind, **options, **({"dropout": 0.1, "target_modules": "all-linear"} if kind == "lora" else {})}


def trained_with(folder: Path) -> list[dict[str, Any]]:
    """Return the config of each trial's model; Ray's checkpoints, which are copies, lie in other folders."""
    files = sorted(folder.glob("trial_*/*_run/model/model_hyperparameters.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def check(name: str, folder: Path, results: list[Any]) -> None:
    """Raise unless every trial trained what it drew, and the results are what was measured and written."""
    models = trained_with(folder)
    assert len(models) == len(results) == 3, (name, len(models), len(results))
    scores = [trial.metric_score for trial in results]
    assert scores == sorted(scores), (name, scores)
    for trial in results:
        rate = trial.parameters["trainer.learning_rate"]
        config = next(model for model in models if model["trainer"]["learning_rate"] == rate)
        expected = expected_adapter(trial.parameters)
        found = {option: config["adapter"].get(option) for option in expected}
        assert found == expected, (name, found, expected)
        assert ("r" in config["adapter"]) is (expected["type"] != "ia3"), (name, config["adapter"])
        loss = trial.eval_stats["output"]["loss"]
        best = min(trial.training_stats["validation"]["output"]["loss"])
        assert abs(loss - best) < 1e-3 * best, (name, loss, best)
        assert abs(trial.metric_score - best) < 1e-3 * best, (name, trial.metric_score, best)
        epochs = len(trial.training_stats["validation"]["output"]["loss"])
        print(f"{name}: {expected}, learning rate {rate:.2e}, {epochs} epochs: validation loss {loss:.4f}", flush=True)
    written = json.loads((folder / "hyperopt_statistics.json").read_text("utf-8"))["hyperopt_results"]
    assert [trial["metric_score"] for trial in written] == scores, name
    assert [trial["parameters"] for trial in written] == [trial.parameters for trial in results], name


def main(folder: Path) -> None:
    """Run the searches."""
    from ludwig.hyperopt.run import hyperopt

    folder.mkdir(parents=True, exist_ok=True)
    small_dataset(folder / "rows.csv")
    for name, search in SEARCHES.items():
        config = search_config(folder / "rows.csv", search)
        results = hyperopt(config, output_directory=str(folder / name), hyperopt_log_verbosity=1)
        check(name, folder / name / "hyperopt", results.ordered_trials)
    print("hyperopt: both executors search over adapter types")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
