"""Train with Ludwig as it is, the plugin switched off."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.job import Job

PAD = 0  # the tokenizer's pad token, which is no token of a row


def prepare(tool: str) -> None:
    """Import what training needs."""
    os.environ["LUDWIG_PEFT_PLUGIN"] = "0"
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from benchmarks.gpu import ludwig_run  # noqa: F401


def config(job: Job) -> dict[str, Any]:
    """Return the config of `job`; stock Ludwig has neither packing nor other adapters to train here.

    Raises:
        ValueError: the run asks for what stock Ludwig has not.
    """
    from benchmarks.gpu.ludwig_run import ludwig_config

    run = job.run
    if run.packing or run.float8 or run.method == "dora":
        raise ValueError(f"stock Ludwig cannot run {run.key}")
    settings = ludwig_config(job)
    if run.method == "qlora":
        settings["quantization"] = {"bits": 4, "bnb_4bit_compute_dtype": "bfloat16"}
    if run.checkpointing:
        settings["trainer"]["enable_gradient_checkpointing"] = True
    return settings


def measure(job: Job) -> dict[str, Any]:
    """Train and return what was measured."""
    from benchmarks.gpu.ludwig_run import train

    _, recorder = train(job, config(job), _count)
    return recorder.result()


def _count(inputs: dict[str, Any], targets: dict[str, Any]) -> Any:
    """Count the tokens that are not padding, on the device."""
    return sum((tensor != PAD).sum() for tensor in (*inputs.values(), *targets.values()))
