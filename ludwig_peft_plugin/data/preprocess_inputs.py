"""What preprocessing starts from: settings, tokenizer and key of the tokens by the config, and metadata of a run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ludwig_peft_plugin.data import retrieval
from ludwig_peft_plugin.data.build import RowTokenizer, TokenSettings
from ludwig_peft_plugin.data.fingerprints import source_fingerprints, token_key
from ludwig_peft_plugin.data.lengths import LengthLimits, context_for_rows
from ludwig_peft_plugin.data.prompts import PlainPrompt, prompt_of
from ludwig_peft_plugin.data.rows import Rows
from ludwig_peft_plugin.data.sources import DataSources, choose_sources
from ludwig_peft_plugin.data.tasks import TaskColumn
from ludwig_peft_plugin.data.token_cache import TokenCache
from ludwig_peft_plugin.data.yaml_paths import DATASET_OPTIONS, resolve_local
from ludwig_peft_plugin.model.base_model import context_length, load_model_config, load_tokenizer


def token_settings(config: Any, section: dict[str, Any]) -> TokenSettings:
    """Return what is the same for all data; the base model's tokenizer and context are read here."""
    generation = section.get("generation") or {}
    return TokenSettings(
        tokenizer=load_tokenizer(config.base_model, config.trust_remote_code),
        input_feature=section["input_features"][0],
        output_feature=section["output_features"][0],
        limits=LengthLimits.of(section, context_for_rows(config, context_length(load_model_config(config)))),
        new_tokens=generation.get("max_new_tokens") or 0,
        tasks=TaskColumn.of(getattr(config, "adapter", None)),
    )


def task_columns(rows: Rows, settings: TokenSettings) -> list[str]:
    """Return the column of the rows' tasks, if there are tasks; a dataset without it is refused."""
    return [] if settings.tasks is None else [settings.tasks.found(rows.frame.columns, rows.source)]


def row_tokenizer(
    section: dict[str, Any], rows: Rows, settings: TokenSettings, folder: str | None = None
) -> RowTokenizer:
    """Return what makes tokens of these rows; the prompt is checked here."""
    columns = list(rows.frame.columns)
    prompt = (
        PlainPrompt(columns, retrieval.PROMPT_COLUMN)
        if retrieval.PROMPT_COLUMN in columns
        else prompt_of(section, settings.input_feature, columns, rows.source)
    )
    return RowTokenizer(settings, prompt, folder)


def key_of_tokens(
    cache: TokenCache,
    section: dict[str, Any],
    preprocessing: dict[str, Any],
    sources: DataSources,
    settings: TokenSettings,
    seed: int,
) -> tuple[str | None, dict[str, pd.DataFrame] | None]:
    """Return the key of a run's tokens, None where they are neither looked for nor kept, and the tables if read.

    Prompts with retrieved examples also depend on Ludwig's index of the examples, whose content is not known here.
    """
    if not cache.is_useful or retrieval.uses_retrieval(section):
        return None, None
    data, frames = source_fingerprints(sources)
    key = token_key(data, settings.tokenizer, section, preprocessing, settings.limits, seed, settings.tasks)
    return key, frames


def arguments_for_ludwig(config: Any, **given: Any) -> dict[str, Any]:
    """Return the data arguments for Ludwig's own function: as given, or else those of a language model's config."""
    section = config_dict(config)
    if section.get("model_type") != "llm" or any(given.get(option) is not None for option in DATASET_OPTIONS):
        return given
    sources = choose_sources(section, data_format=given["data_format"])
    found = {option: getattr(sources, option) for option in DATASET_OPTIONS if option in given}
    local = {option: resolve_local(path, option) for option, path in found.items() if path is not None}
    return {**given, **local, "data_format": sources.data_format}


def loaded_metadata(metadata: Any) -> dict[str, Any]:
    """Return a copy of the metadata, read from a file where a path is given."""
    if isinstance(metadata, str):
        from ludwig.data.preprocessing import load_metadata

        metadata = load_metadata(metadata)
    return dict(metadata or {})


def config_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested dicts, which it may be already."""
    result: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return result
