"""Write the README.md of an exported folder: what the model is, how to use it, how it was made and how good it is."""

from __future__ import annotations

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ludwig_peft_plugin import __version__
from ludwig_peft_plugin.engine.virtual_tokens import needs_tasks
from ludwig_peft_plugin.export.formats import ExportFormat, public_name
from ludwig_peft_plugin.export.loss_curve import LOSS_CURVE_FILE, draw_loss_curve
from ludwig_peft_plugin.export.prompt_template import PROMPT_FILE, ExportedPrompt
from ludwig_peft_plugin.export.public_config import public_yaml, scrub
from ludwig_peft_plugin.export.result import ExportResult
from ludwig_peft_plugin.export.summary import SPLITS, TrainingSummary

_METRICS = {"loss": "loss (nats per token)", "perplexity": "perplexity", "token_accuracy": "token accuracy"}
_PACKAGES = ("ludwig", "torch", "transformers", "peft", "bitsandbytes")


def write_model_card(
    folder: Path,
    llm: Any,
    export_format: ExportFormat,
    result: ExportResult,
    summary: TrainingSummary,
    prompt: ExportedPrompt,
    chat_note: str,
    dtype: Any,
) -> None:
    """Write `README.md` and `loss_curve.png` to `folder`."""
    has_curve = draw_loss_curve(summary, folder / LOSS_CURVE_FILE)
    config = llm.config_obj
    base, method = public_name(config.base_model), _method(config)
    code = usage_code(llm, export_format, prompt, dtype)
    sections = [
        _front_matter(base, config, export_format),
        f"# {base}, fine-tuned with {method}\n\n{_introduction(base, config, export_format, result, summary)}",
        f"## Use\n\n```python\n{code}```\n\n{_prompt_notes(prompt, chat_note)}",
        f"## Results\n\n{metrics_table(summary)}{_curve(has_curve)}",
        f"## Verification\n\n{_verification(result)}",
        f"## Training\n\n{_training(summary)}\n\n```yaml\n{public_yaml(config)}```",
        f"## Versions\n\n{_versions()}",
    ]
    (folder / "README.md").write_text("\n\n".join(map(str.strip, sections)) + "\n", encoding="utf-8")


def usage_code(llm: Any, export_format: ExportFormat, prompt: ExportedPrompt, dtype: Any) -> str:
    """Return a Python program that loads the folder, makes a prompt and prints an answer."""
    values = ", ".join(f"{json.dumps(field, ensure_ascii=False)}: {_example(field, prompt)}" for field in prompt.fields)
    tokens = getattr(llm, "max_new_tokens", None) or 64
    drops_eos = llm.tokenizer("a")["input_ids"][-1:] == [llm.tokenizer.eos_token_id]
    drop = "inputs = {name: ids[:, :-1] for name, ids in inputs.items()}  # without the end the tokenizer appends\n"
    return (
        "import json\nfrom pathlib import Path\n\n"
        f"{export_format.loading_code(llm, dtype)}\n"
        f'template = json.loads(Path(folder, "{PROMPT_FILE}").read_text(encoding="utf-8"))["template"]\n'
        f"prompt = template.format(**{{{values}}})\n"
        'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)\n'
        f"{drop if drops_eos else ''}"
        f"{_task(llm)}"
        f"output = model.generate(**inputs, max_new_tokens={tokens}, eos_token_id=tokenizer.eos_token_id)\n"
        'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)\n'
        "print(answer)\n"
    )


def _task(llm: Any) -> str:
    """Return the line that chooses one of the tasks of a model with a prompt for each, nothing for another."""
    if not needs_tasks(llm.model):
        return ""
    names = getattr(llm.config_obj.adapter, "tasks", None) or []
    called = "".join(f", {number} is {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(names))
    last = llm.model.active_peft_config.num_tasks - 1
    return f'inputs["task_ids"] = inputs["input_ids"].new_tensor([0])  # the task, from 0 to {last}{called}\n'


def metrics_table(summary: TrainingSummary) -> str:
    """Return a table of each split's metrics at the evaluation with the lowest validation loss."""
    best = summary.best_evaluation()
    splits = [split for split in SPLITS if summary.series(split, "loss")]
    if best is None or not splits:
        return "No evaluation was made during training.\n"
    names = [name for name in _METRICS if any(summary.series(split, name) for split in splits)]
    lines = [
        "| split | " + " | ".join(_METRICS[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for split in splits:
        cells = [_at(summary.series(split, name), best) for name in names]
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    at = f" (step {summary.steps[best]:,})" if best < len(summary.steps) else ""
    by = "validation" if summary.series("validation", "loss") else "training"
    return "\n".join(lines) + f"\n\nAt evaluation {best + 1} of the run{at}, the one with the lowest {by} loss.\n"


def _front_matter(base: str, config: Any, export_format: ExportFormat) -> str:
    adapter = getattr(config, "adapter", None)
    values = {
        "base_model": base,
        "base_model_relation": "adapter" if export_format.name == "adapter" else "finetune",
        "library_name": export_format.library,
        "pipeline_tag": "text-generation",
        "tags": ["ludwig", "ludwig-peft-plugin", *([adapter.type] if adapter else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _method(config: Any) -> str:
    adapter, several = getattr(config, "adapter", None), getattr(config, "adapters", None)
    if several:
        return ", ".join(f"{adapter.type} ({name})" for name, adapter in several.objects().items())
    return str(adapter.type) if adapter else "full fine-tuning"


def _introduction(
    base: str, config: Any, export_format: ExportFormat, result: ExportResult, summary: TrainingSummary
) -> str:
    what = (
        f"An adapter for `{base}`; it is loaded on top of that model."
        if export_format.name == "adapter"
        else f"`{base}` with what was learned in its weights; it needs no other model."
    )
    share = ""
    if summary.total_parameters:
        percent = 100 * summary.trainable_parameters / summary.total_parameters
        counts = f"{summary.trainable_parameters:,} of {summary.total_parameters:,}"
        share = f" {counts} parameters ({percent:.2f}%) were trained."
    return f"{what} Weights are stored in {result.dtype}.{share}"


def _prompt_notes(prompt: ExportedPrompt, chat_note: str) -> str:
    notes = [
        f"The model answers with `{prompt.output_feature}` and then `{prompt.stop}`. The prompt has a field for each "
        f"column of the data ({', '.join(f'`{field}`' for field in prompt.fields)}). It is in `{PROMPT_FILE}` and has "
        f"to be exactly this text:\n\n{_fenced(prompt.template)}"
    ]
    if prompt.needs_retrieval:
        notes.append("`__context__` takes examples of the training data that retrieval picks for each row.")
    return "\n\n".join([*notes, chat_note])


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _example(field: str, prompt: ExportedPrompt) -> str:
    if field in prompt.number_fields:
        return "1.0"
    return 'json.dumps("...", indent=2).strip(\'"\')' if field in prompt.json_fields else '"..."'


def _curve(has_curve: bool) -> str:
    return f"\n![training and validation loss by step]({LOSS_CURVE_FILE})\n" if has_curve else ""


def _verification(result: ExportResult) -> str:
    comparison = result.comparison
    kept = result.change_kept
    return (
        "The files were loaded with plain `transformers` and `peft` and their logits compared with the trained model's "
        f"on {comparison.tokens} tokens:\n\n"
        "| measure | value |\n|---|---|\n"
        f"| largest difference of a logit | {comparison.max_abs_difference:.2e} |\n"
        f"| the same, in standard deviations of the logits (at most {result.tolerance:.0e} allowed) "
        f"| {comparison.relative_difference:.2e} |\n"
        f"| mean KL divergence from the trained model (nats) | {comparison.mean_kl:.2e} |\n"
        + (
            f"| share of the adapter's change of the weights that is left after rounding | {kept:.2%} |\n"
            if kept is not None
            else ""
        )
    )


def _training(summary: TrainingSummary) -> str:
    parts = []
    if summary.rows:
        parts.append("Examples: " + ", ".join(f"{count:,} {split}" for split, count in summary.rows.items()) + ".")
    if summary.train_loss:
        parts.append(f"Optimiser steps: {summary.train_loss[-1][0]:,}.")
    if summary.seconds:
        parts.append(f"Time: {summary.seconds:,.0f} s.")
    parts.append("The Ludwig config, without defaults, credentials and local folders:")
    return " ".join(parts)


def _versions() -> str:
    versions = {"ludwig-peft-plugin": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["python"] = platform.python_version()
    return ", ".join(f"{name} {scrub(version)}" for name, version in versions.items())


def _at(series: list[float], index: int) -> str:
    """Return a metric's value at an evaluation; a split that was evaluated less often gives its last value."""
    if not series:
        return ""
    value = series[min(index, len(series) - 1)]
    return f"{value:.4f}" if math.isfinite(value) else str(value)
