"""Train one method of a comparison in this process: `python -m ludwig_peft_plugin.compare.worker FOLDER`.

A process of its own, so that its peak of memory is its own, and a crash is not that of the others.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ludwig_peft_plugin.compare.plan import BASE
from ludwig_peft_plugin.compare.results import Result, failed, write_result

JOB = "job.json"
SECONDS = "seconds.json"
"""How long the parts of an interrupted run have taken."""


def run_job(folder: Path) -> Result:
    """Train what `job.json` in `folder` says, going on after an interruption, and write the result.

    Raises:
        Exception: whatever training raises; it is in the result too.
    """
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    method, key = job["method"], job["key"]
    before = json.loads((folder / SECONDS).read_text()) if (folder / SECONDS).is_file() else 0.0
    started = time.monotonic()
    try:
        result = _train(folder, method, key, job["config"], job["seed"])
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        text = "\n".join(lines[:6]) if lines else type(error).__name__
        write_result(folder, failed(method, key, text, before + time.monotonic() - started))
        raise
    except BaseException:
        (folder / SECONDS).write_text(json.dumps(before + time.monotonic() - started))
        raise
    result = Result(**{**vars(result), "seconds": before + result.seconds})
    write_result(folder, result)
    return result


def _train(folder: Path, method: str, key: str, config: dict[str, Any], seed: int) -> Result:
    from ludwig_peft_plugin.register import register

    register()
    import torch
    from ludwig.api import LudwigModel

    from ludwig_peft_plugin.evaluation.predictor import PeftPredictor

    model = LudwigModel(config)
    run = folder / "run_model"
    resume = _resumable(run)
    if run.exists() and resume is None:
        shutil.rmtree(run)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    results = model.train(
        experiment_name="run",
        model_name="model",
        output_directory=str(folder),
        model_resume_path=resume,
        random_seed=seed,
        skip_save_log=True,
        skip_save_processed_input=False,
    )
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_of_process()
    trained, total = model.model.parameter_counts()
    data = results.preprocessed_data
    predictor = PeftPredictor(model.model)
    output = next(iter(model.model.output_features))
    losses = {
        name: predictor.losses(rows)["loss"] if rows is not None else None
        for name, rows in (("validation", data.validation_set), ("test", data.test_set))
    }
    final = {name: _last(getattr(results.train_stats, name, None), output) for name in losses}
    trainer = model.config_obj.trainer
    return Result(
        method=method,
        key=key,
        trained=0 if method == BASE else trained,
        total=total,
        validation_loss=losses["validation"],
        test_loss=losses["test"],
        final_validation_loss=final["validation"] if method != BASE else losses["validation"],
        final_test_loss=final["test"] if method != BASE else losses["test"],
        seconds=seconds,
        peak_bytes=peak,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        steps=_steps(run),
        learning_rate=None if method == BASE else float(trainer.learning_rate),
    )


def _resumable(run: Path) -> str | None:
    """Return the folder of a run that an interruption has left with a checkpoint, else None."""
    progress = list(run.glob("model/training_progress*.json")) if run.is_dir() else []
    checkpoints = list(run.glob("model/training_checkpoints/*")) if run.is_dir() else []
    return str(run) if progress and checkpoints else None


def _last(stats: Any, output: str) -> float | None:
    losses = (stats or {}).get(output, {}).get("loss") if isinstance(stats, dict) else None
    return float(losses[-1]) if losses else None


def _steps(run: Path) -> int | None:
    for path in run.glob("model/training_progress*.json"):
        steps: int | None = json.loads(path.read_text(encoding="utf-8")).get("steps")
        return steps
    return None


def _peak_of_process() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used  # kilobytes on Linux


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
