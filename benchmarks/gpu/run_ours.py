"""Train with this plugin, as `ludwig train` does; also its plain path, with which the engine's losses are compared."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.job import Job
from benchmarks.gpu.runs import PLAIN

ENGINE_SWITCHES = ("LUDWIG_PEFT_FUSED", "LUDWIG_PEFT_CUDA_GRAPHS")
"""Environment variables that are 0 to train with transformers' and PEFT's own layers, launched from Python."""


def prepare(tool: str) -> None:
    """Import what training needs. The plugin is registered by hand: start-up files are not read everywhere.

    The plain path computes in float32, with products in TF32: rounding is an eighth of bfloat16's.
    """
    if tool == PLAIN:
        import torch

        os.environ.update(dict.fromkeys(ENGINE_SWITCHES, "0"))
        torch.backends.cuda.matmul.allow_tf32 = True
    from ludwig_peft_plugin.register import register

    register()
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from benchmarks.gpu import ludwig_run  # noqa: F401


def config(job: Job) -> dict[str, Any]:
    """Return the config of `job`: defaults wherever the run does not ask for something."""
    from benchmarks.gpu.ludwig_run import ludwig_config

    run = job.run
    settings = ludwig_config(job)
    settings["adapter"]["type"] = run.method
    if run.float8:
        settings["quantization"] = {"backend": "torchao", "mode": "float8"}
    if run.packing:
        settings["trainer"]["packing"] = True
    if run.checkpointing:
        settings["trainer"]["enable_gradient_checkpointing"] = True
    for name, value in run.overrides.items():
        _set(settings, name, value)
    return settings


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    """Set the option with the dotted `name`."""
    *sections, option = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[option] = value


def measure(job: Job) -> dict[str, Any]:
    """Train and return what was measured. The plugin's batches count their tokens without padding and filler."""
    from benchmarks.gpu.ludwig_run import train

    os.environ.update(dict.fromkeys(job.run.switched_off, "0"))
    _, recorder = train(job, config(job), lambda step, _: step.tokens)
    return recorder.result()
