"""Carry out the config's `export` list after training: write, verify, describe, put in place."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ludwig_peft_plugin import __version__
from ludwig_peft_plugin.adapters.several.mixed import using
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export import adapter, adapterhub, merged  # noqa: F401  (the built-in formats register themselves)
from ludwig_peft_plugin.export.formats import ExportFormat, format_of, trained_dtype
from ludwig_peft_plugin.export.model_card import write_model_card
from ludwig_peft_plugin.export.named_adapters import check_choice, renew_merged
from ludwig_peft_plugin.export.prompt_template import exported_prompt, set_chat_template, write_prompt_file
from ludwig_peft_plugin.export.result import ExportOptions, ExportResult
from ludwig_peft_plugin.export.summary import TrainingSummary
from ludwig_peft_plugin.export.target import (
    MANIFEST,
    VerificationError,
    check_distinct,
    check_path,
    failed_folder,
    resolve_target,
    staged,
)
from ludwig_peft_plugin.export.verify import (
    compare,
    default_tolerance,
    logits_of,
    prompt_tokens,
    verification_device,
)

logger = logging.getLogger(__name__)

_KEPT_WARNING = 0.9


def check_exports(config_obj: Any) -> list[ExportOptions]:
    """Return the config's exports, checked as far as that is possible before training.

    Raises:
        ExportError: an unknown format, a path outside the run directory, two exports in one place, or a format that
            this config's model cannot be written in.
    """
    options = [ExportOptions.from_config(entry) for entry in getattr(config_obj, "export", None) or []]
    for entry in options:
        format_of(entry.format).check(config_obj)
        check_choice(config_obj, entry)
    check_distinct([check_path(entry.path) for entry in options])
    return options


def export_all(
    llm: Any, run_directory: str, summary: TrainingSummary, prompts: Sequence[str] | None = None
) -> list[ExportResult]:
    """Write and verify every export of `llm.config_obj.export` below `run_directory`.

    The live model is as it was afterwards. One export that fails does not keep the others from being made.

    Args:
        llm: the trained model (`model`, `tokenizer`, `config_obj`, `context_len`).
        run_directory: the run's results folder; it is made if it is not there.
        summary: the run's numbers for the model card.
        prompts: rendered prompts to compare the logits on, the first four are used; without them, fixed texts.

    Raises:
        ExportError: one of the exports could not be made, or is not the trained model.
    """
    options = check_exports(llm.config_obj)
    if not options:
        return []
    directory = Path(run_directory)
    targets = [resolve_target(directory, check_path(entry.path)) for entry in options]
    tokens = prompt_tokens(llm, prompts)
    renew_merged(llm)
    results: list[ExportResult] = []
    failures: list[ExportError] = []
    for entry, target in zip(options, targets, strict=True):
        logger.info("Exporting %s to %s", entry.format, target)
        try:
            with using(llm, entry.adapter):
                results.append(_export(llm, entry, target, summary, tokens))
        except ExportError as error:
            logger.error("%s", error)
            failures.append(error)
    if results:
        logger.info("%s", results_table(results))
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExportError("\n".join(str(failure) for failure in failures)) from failures[0]
    return results


def results_table(results: Sequence[ExportResult]) -> str:
    """Return a short table of what was exported and how near it is to the trained model."""
    lines = [f"{'export':<10}{'dtype':<10}{'max |Δ logit|':>14}{'mean KL':>11}{'seconds':>9}  folder"]
    lines.extend(
        f"{result.format:<10}{result.dtype:<10}{result.max_abs_difference:>14.2e}{result.mean_kl:>11.2e}"
        f"{result.seconds:>9.1f}  {result.folder}"
        for result in results
    )
    return "\n".join(lines)


def _export(
    llm: Any,
    options: ExportOptions,
    target: Path,
    summary: TrainingSummary,
    tokens: Sequence[torch.Tensor],
) -> ExportResult:
    """Make one export of the model with the adapter that is active."""
    started = time.perf_counter()
    trained = logits_of(llm.model, tokens)
    export_format = format_of(options.format)
    with staged(target) as folder:
        written = export_format.write(llm, folder, options)
        tokenizer = copy.deepcopy(llm.tokenizer)
        prompt = exported_prompt(llm.config_obj, llm.tokenizer.eos_token)
        chat_note = set_chat_template(tokenizer, prompt)
        tokenizer.save_pretrained(str(folder))
        write_prompt_file(prompt, folder)
        comparison = compare(trained, _exported_logits(llm, export_format, folder, written.dtype, tokens))
        tolerance = options.tolerance
        if tolerance is None:
            tolerance = default_tolerance(written.dtype, trained_dtype(llm))
        dtype = str(written.dtype).removeprefix("torch.")
        seconds = time.perf_counter() - started
        result = ExportResult(options.format, str(target), dtype, comparison, tolerance, seconds, written.change_kept)
        _check(result, target)
        write_model_card(folder, llm, export_format, result, summary, prompt, chat_note, written.dtype)
        _write_manifest(folder, result)
    return result


def _exported_logits(
    llm: Any, export_format: ExportFormat, folder: Path, stored: torch.dtype, tokens: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Load what was written and return its logits; the loaded model is dropped before anything else is loaded."""
    live = next(llm.model.parameters()).device
    device = verification_device(live, export_format.memory_bytes(llm, folder))
    # Building a model draws random numbers; a run that goes on must not notice.
    with torch.random.fork_rng(devices=[live] if live.type == "cuda" else []):
        return logits_of(export_format.load(llm, folder, device, stored), tokens)


def _check(result: ExportResult, target: Path) -> None:
    """Raise `VerificationError` when an export is further from the trained model than its tolerance."""
    comparison = result.comparison
    if not comparison.relative_difference <= result.tolerance:
        raise VerificationError(
            f"export: format {result.format}: what was written is not the trained model. The largest difference of a "
            f"logit is {comparison.max_abs_difference:.3g}, {comparison.relative_difference:.3g} standard deviations, "
            f"where {result.tolerance:.3g} is allowed (export.tolerance); mean KL {comparison.mean_kl:.3g} nats.\n"
            f"The files are in {failed_folder(target)} for inspection."
        )
    if result.change_kept is not None and result.change_kept < _KEPT_WARNING:
        logger.warning(
            "export: format %s in %s keeps only %.0f%% of the adapter's change of the weights, which is small beside "
            "that dtype's steps. Use dtype: float32, or format: adapter.",
            result.format,
            result.dtype,
            100 * result.change_kept,
        )


def _write_manifest(folder: Path, result: ExportResult) -> None:
    """Write the file that says the folder is an export, and what its verification found."""
    values = {
        "format": result.format,
        "dtype": result.dtype,
        "tolerance": result.tolerance,
        "verification": asdict(result.comparison),
        "change_kept": result.change_kept,
        "ludwig_peft_plugin": __version__,
    }
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
