"""Train with TRL, or with Unsloth, which runs TRL's trainer on its own model code; each as its documentation shows."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.job import Job
from benchmarks.gpu.measure import Recorder
from benchmarks.gpu.rows import TEMPLATE, mean_tokens, read_rows
from benchmarks.gpu.runs import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRADIENT_NORM,
    RANK,
    SEED,
    TARGETS,
    UNSLOTH,
    WARM_UP_FRACTION,
)


def prepare(tool: str) -> None:
    """Import what training needs; Unsloth has to come first, because it changes the others when imported."""
    if tool == UNSLOTH:
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        import unsloth  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401
    from trl import SFTTrainer  # noqa: F401


def measure(job: Job) -> dict[str, Any]:
    """Train and return what was measured."""
    run = job.run
    recorder = Recorder(run.warm_up, run.steps, job.device, run.stop)
    trainer = (_unsloth if run.tool == UNSLOTH else _trl)(job)
    _watch(trainer, recorder)
    try:
        trainer.train()
    finally:
        recorder.end()
    rows = read_rows(job.rows)
    steps_per_epoch = len(trainer.get_train_dataloader())
    total = mean_tokens(rows, trainer.processing_class, run.length) * len(rows)
    return recorder.result(mean_step_tokens=total / steps_per_epoch)


def _arguments(job: Job) -> dict[str, Any]:
    """Return the trainer's arguments; what is not here is TRL's default."""
    run = job.run
    total = run.warm_up + run.steps
    return {
        "output_dir": str(job.output),
        "max_steps": total,
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": 1,  # Unsloth would otherwise choose 2
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(WARM_UP_FRACTION * total)),
        "max_grad_norm": MAX_GRADIENT_NORM,
        "optim": "adamw_torch_fused",
        "bf16": job.device == "cuda",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": run.checkpointing,
        "max_length": run.length,
        "packing": run.packing,
        "save_strategy": "no",
        "report_to": [],
        "seed": SEED,
    }


def _trl(job: Job) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    run = job.run
    loading: dict[str, Any] = {"dtype": torch.bfloat16 if job.device == "cuda" else torch.float32}
    if run.method == "qlora":
        loading["device_map"] = {"": 0}
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    pairs = [
        {"prompt": TEMPLATE.format(instruction=row["instruction"]), "completion": row["output"]}
        for row in read_rows(job.rows)
    ]
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=TARGETS,
        use_dora=run.method == "dora",
        task_type="CAUSAL_LM",
    )
    # Liger's kernels are Triton's, which runs on GPUs only.
    settings = {**_arguments(job), "model_init_kwargs": loading, "use_liger_kernel": job.device == "cuda"}
    return SFTTrainer(
        model=job.base_model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(job.base_model),
        peft_config=adapter,
    )


def _unsloth(job: Job) -> Any:
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from datasets import Dataset

    run = job.run
    if run.method == "dora":
        raise ValueError("Unsloth's fast path has no DoRA")
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.base_model, max_seq_length=run.length, dtype=torch.bfloat16, load_in_4bit=run.method == "qlora"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if run.checkpointing else False,
        random_state=SEED,
    )
    texts = [
        {"text": TEMPLATE.format(instruction=row["instruction"]) + row["output"] + tokenizer.eos_token}
        for row in read_rows(job.rows)
    ]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**_arguments(job), dataset_text_field="text"),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )


def _watch(trainer: Any, recorder: Recorder) -> None:
    """Tell the recorder of each step: its loss, its tokens, its end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            recorder.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            recorder.end_step()
            if recorder.finished:
                control.should_training_stop = True

    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        tokens = ids.numel() if mask is None or mask.dim() != 2 else mask.sum()
        loss = step(model, inputs, *args, **kwargs)
        recorder.record(loss, tokens)
        return loss

    trainer.training_step = training_step
    trainer.add_callback(Clock())
