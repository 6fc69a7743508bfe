"""Evaluate a freshly tuned model with generated answers through `LudwigModel.evaluate`, ours or stock Ludwig's."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.job import Job
from benchmarks.gpu.measure import GIB
from benchmarks.gpu.runs import STOCK

NEW_TOKENS = 64


def prepare(tool: str) -> None:
    """Import what evaluation needs."""
    from benchmarks.gpu import run_ours, run_stock

    (run_stock if tool == STOCK else run_ours).prepare(tool)


class Stopwatch:
    """Adds up the seconds a method takes, until `stop`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        self._owner, self._name, self._method = owner, name, getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            outcome = self._method(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return outcome

        setattr(owner, name, timed)

    def stop(self) -> None:
        """Put the method back."""
        setattr(self._owner, self._name, self._method)


def measure(job: Job) -> dict[str, Any]:
    """Train one step, then evaluate with answers and return how fast they came.

    The weights are random, so practically no answer ends before `NEW_TOKENS`; what was generated is counted all the
    same. The evaluation runs twice, and the second one counts: the first one, which may compile, is given too. Reading
    the rows is left out on both sides. Stock Ludwig answers one prompt after another, so few of them are enough.
    """
    import pandas as pd
    import torch

    from benchmarks.gpu import run_ours, run_stock
    from benchmarks.gpu.ludwig_run import train

    stock = job.run.tool == STOCK
    settings = (run_stock if stock else run_ours).config(job)
    settings["generation"] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    model, recorder = train(job, settings, lambda inputs, targets: 0)
    questions = pd.read_csv(job.questions, keep_default_na=False).head(job.run.prompts)
    passes = [_evaluate(model, questions, job) for _ in range(1 if stock else 2)]
    first, last = passes[0], passes[-1]
    result: dict[str, Any] = {
        "prompts": len(questions),
        **last,
        "tok_s": round(last["tokens"] / last["seconds"], 1),
        "answers_tok_s": round(last["tokens"] / last["answers_seconds"], 1),
        "first_tok_s": round(first["tokens"] / first["seconds"], 1),
        "setup_s": recorder.result()["setup_s"],
    }
    if job.device == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return result


def _generator(stock: bool) -> Any:
    """Return the class whose `generate` makes the answers."""
    if stock:
        from ludwig.models.llm import LLM

        return LLM
    from ludwig_peft_plugin.evaluation.predictor import PeftPredictor

    return PeftPredictor


def _evaluate(model: Any, questions: Any, job: Job) -> dict[str, float]:
    """Evaluate `questions` once.

    Returns:
        tokens: how many were generated.
        seconds: of the evaluation, without preprocessing.
        answers_seconds: of these, the generation itself, without losses and metrics.
        loss: nats a target token.
    """
    preprocessing = Stopwatch(model, "_preprocess_for_prediction")
    answers = Stopwatch(_generator(job.run.tool == STOCK), "generate")
    start = time.perf_counter()
    try:
        statistics, predictions, _ = model.evaluate(
            dataset=questions,
            collect_predictions=True,
            collect_overall_stats=False,
            skip_save_unprocessed_output=True,
            skip_save_predictions=True,
            skip_save_eval_stats=True,
            output_directory=str(job.output),
        )
        seconds = time.perf_counter() - start
    finally:
        preprocessing.stop()
        answers.stop()
    return {
        "tokens": sum(len(answer) for answer in predictions["output_predictions"]),
        "seconds": seconds - preprocessing.seconds,
        "answers_seconds": answers.seconds,
        "loss": float(statistics["output"]["loss"]),
    }
