"""Stand-ins for Ludwig's `preprocess_for_training` and `preprocess_for_prediction`, for text-to-text language models.

Same arguments and results as `ludwig/data/preprocessing.py`, with `TokenDataset`s. Nothing is written beside the data:
tokens of training are kept in Ludwig's cache (`token_cache.py`).
Everything else (other model types and output features, preference tuning, images) goes to Ludwig's originals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from ludwig.backend import LOCAL_BACKEND
from ludwig.constants import FULL, TEST, TRAINING, VALIDATION
from ludwig.data.dataset.base import Dataset
from ludwig.utils.defaults import default_random_seed

from ludwig_peft_plugin.adapters.several.rows import adapter_column, adapters_of_rows
from ludwig_peft_plugin.data import retrieval
from ludwig_peft_plugin.data.build import RowTokenizer, TokenSettings
from ludwig_peft_plugin.data.fingerprints import source_fingerprints, token_key
from ludwig_peft_plugin.data.lengths import LengthLimits, context_for_rows
from ludwig_peft_plugin.data.metadata import OWN_KEY, feature_metadata, random_seed_of, retrieval_index_of
from ludwig_peft_plugin.data.progress import RowProgress
from ludwig_peft_plugin.data.prompts import PlainPrompt, prompt_of
from ludwig_peft_plugin.data.rows import Rows
from ludwig_peft_plugin.data.sources import DataSources, choose_sources
from ludwig_peft_plugin.data.tasks import TaskColumn
from ludwig_peft_plugin.data.token_cache import TokenCache
from ludwig_peft_plugin.data.training_tokens import (
    find_sets,
    recorded_warnings,
    say_empty,
    token_cache,
    tokenize_sets,
)
from ludwig_peft_plugin.data.yaml_paths import DATASET_OPTIONS, resolve_local
from ludwig_peft_plugin.errors import DataError
from ludwig_peft_plugin.model.base_model import context_length, load_model_config, load_tokenizer

TrainingData = tuple[Dataset, Dataset | None, Dataset | None, dict[str, Any]]


def is_text_to_text(config: Any) -> bool:
    """Return whether this is a language model that reads text and writes text, zero-shot or fine-tuned on targets."""
    config = _as_dict(config)
    trainer = config.get("trainer") or {}
    return (
        config.get("model_type") == "llm"
        and not config.get("is_multimodal")
        and trainer.get("type", "none") in ("none", "finetune")
        and all(feature["type"] == "text" for feature in config["input_features"] + config["output_features"])
    )


def preprocess_for_training(
    config: Any,
    dataset: Any = None,
    training_set: Any = None,
    validation_set: Any = None,
    test_set: Any = None,
    training_set_metadata: Any = None,
    data_format: str | None = None,
    skip_save_processed_input: bool = False,
    preprocessing_params: dict[str, Any] | None = None,
    backend: Any = LOCAL_BACKEND,
    random_seed: int = default_random_seed,
    callbacks: list[Any] | None = None,
    *,
    original: Callable[..., TrainingData],
) -> TrainingData:
    """Return the training, validation and test set (the last two can be None) and the training set metadata.

    Args:
        config: Ludwig's config object.
        dataset: all rows: path, URI, DataFrame or dict; with the three sets None, the config's dataset section is used.
        training_set: rows to train on, instead of `dataset`.
        validation_set: rows to validate on, beside `training_set`.
        test_set: rows to test on, beside `training_set`.
        training_set_metadata: of an earlier run: a path or dict, whose features are kept as they are.
        data_format: one of Ludwig's names for file formats; None or `auto` goes by the file's name.
        skip_save_processed_input: tokens are not kept for the next run; those that are there are used all the same.
        preprocessing_params: Ludwig's merged preprocessing section; None takes it from `config`.
        backend: Ludwig's backend: its cache folder, and whether this process shows progress and keeps tokens.
        random_seed: for sampling and splitting.
        callbacks: Ludwig's callbacks; where kept tokens are used, those of preprocessing are not called, as in Ludwig.
        original: Ludwig's function, for everything that is not text to text.

    Raises:
        DataError: the data cannot be used; the message says what is wrong where.
    """
    if not is_text_to_text(config):
        given = {"dataset": dataset, "training_set": training_set, "validation_set": validation_set}
        return original(
            config,
            **_for_ludwig(config, **given, test_set=test_set, data_format=data_format),
            training_set_metadata=training_set_metadata,
            skip_save_processed_input=skip_save_processed_input,
            backend=backend,
            random_seed=random_seed,
            callbacks=callbacks,
            **({} if preprocessing_params is None else {"preprocessing_params": preprocessing_params}),
        )
    section = _as_dict(config)
    preprocessing = {**(section.get("preprocessing") or {}), **(preprocessing_params or {})}
    sources = choose_sources(section, dataset, training_set, validation_set, test_set, data_format)
    metadata = _load_metadata(training_set_metadata)
    settings = _settings(config, section)
    cache = token_cache(backend, skip_save=skip_save_processed_input)
    key, frames = _key(cache, section, preprocessing, sources, settings, random_seed)
    sets, index_name = find_sets(cache, key), None
    if sets is None:
        with recorded_warnings() as warnings:
            rows = Rows(section, preprocessing, sources, random_seed, frames=frames)
            rows.require_targets()
            rows.render_retrieved(retrieval_index_of(metadata))
            tokenizer = _tokenizer(section, rows, settings, None if key is None else cache.scratch_folder)
            rows.drop_unusable(tokenizer.prompt.columns, for_split=True, kept=_task_columns(rows, settings))
            sets, index_name = tokenize_sets(rows, tokenizer, backend, callbacks or []), rows.index_name
        del rows, frames  # the text is in the sets
        if key is not None and cache.may_write:
            sets = cache.keep(key, replace(sets, warnings=warnings))

    for feature, longest, template_tokens in (
        (settings.input_feature, sets.longest_prompt, sets.template_tokens),
        (settings.output_feature, sets.longest_target, 0),
    ):
        metadata.setdefault(feature["name"], feature_metadata(feature, settings.tokenizer, longest, template_tokens))
    metadata[OWN_KEY] = {"random_seed": random_seed, "retrieval_index": index_name}
    built = {name: settings.dataset(rows) if len(rows) else None for name, rows in sets.rows.items()}
    training = built[TRAINING]
    assert training is not None  # say_empty has raised
    return training, built[VALIDATION], built[TEST], metadata


def preprocess_for_prediction(
    config: Any,
    dataset: Any,
    training_set_metadata: Any = None,
    data_format: str | None = None,
    split: str = FULL,
    include_outputs: bool = True,
    backend: Any = LOCAL_BACKEND,
    callbacks: list[Any] | None = None,
    *,
    original: Callable[..., tuple[Dataset, dict[str, Any]]],
) -> tuple[Dataset, dict[str, Any]]:
    """Return the rows to predict or evaluate on, and the training set metadata.

    With `include_outputs` (evaluation) rows have targets, under the same limits as in training. Without it they are
    prompts, and no row is left out. A `split` other than `full` is the same set of rows as in training.

    Args:
        config: Ludwig's config object.
        dataset: path, URI, DataFrame, dict, or an already built dataset; None takes the config's dataset section.
        training_set_metadata: what training returned, a path to it, or what stock Ludwig wrote.
        data_format: one of Ludwig's names for file formats; None or `auto` goes by the file's name.
        split: `full`, `training`, `validation` or `test`.
        include_outputs: whether targets are needed.
        backend: Ludwig's backend: its cache folder, and whether this process shows progress.
        callbacks: Ludwig's callbacks.
        original: Ludwig's function, for everything that is not text to text.

    Raises:
        DataError: the data cannot be used; the message says what is wrong where.
    """
    if not is_text_to_text(config):
        return original(
            config,
            **_for_ludwig(config, dataset=dataset, data_format=data_format),
            training_set_metadata=training_set_metadata,
            split=split,
            include_outputs=include_outputs,
            backend=backend,
            callbacks=callbacks,
        )
    if isinstance(dataset, Dataset):
        return dataset, training_set_metadata
    section = _as_dict(config)
    metadata = _load_metadata(training_set_metadata)
    seed = random_seed_of(metadata, default_random_seed)
    sources = choose_sources(section, dataset, data_format=data_format)
    preprocessing = section.get("preprocessing") or {}
    settings = _settings(config, section)
    frames, named = None, adapter_column(section) is not None
    if split != FULL and include_outputs and not named:
        # Tokens of training are used again; those of other rows are not kept, as in stock Ludwig.
        cache = token_cache(backend, skip_save=True)
        key, frames = _key(cache, section, preprocessing, sources, settings, seed)
        sets = find_sets(cache, key)
        if sets is not None and len(sets.rows[split]):
            return settings.dataset(sets.rows[split]), metadata
    rows = Rows(section, preprocessing, sources, seed, frames=frames, sample=split != FULL)
    if include_outputs:
        rows.require_targets()
    rows.render_retrieved(retrieval_index_of(metadata))
    tokenizer = _tokenizer(section, rows, settings)
    adapters = adapters_of_rows(section, rows.frame, rows.source) if named else None
    rows.drop_unusable(
        tokenizer.prompt.columns,
        for_split=split != FULL,
        for_targets=include_outputs,
        kept=_task_columns(rows, settings),
    )
    frame = rows.frame if split == FULL else rows.frame.iloc[rows.split()[split]]
    if frame.empty:
        raise DataError(f"There are no {split} rows in {rows.source}: preprocessing.split puts none there.")

    for callback in callbacks or []:
        callback.on_build_data_start(frame, "prediction")
    progress = RowProgress("Tokenizing", len(frame), backend, callbacks)
    if include_outputs:
        places = np.arange(len(frame))
        remaining: list[np.ndarray] = []
        built, report = tokenizer.with_targets(frame, places, rows.target_column, split, progress.advance, remaining)
        if not len(built):
            say_empty(split, report, settings.limits, required=True)
        kept = np.concatenate(remaining)
    else:
        built, kept = tokenizer.prompts_only(frame, split, progress.advance), np.arange(len(frame))
    progress.close()
    for callback in callbacks or []:
        callback.on_build_data_end(frame, "prediction")
    result = settings.dataset(built)
    if adapters is not None:
        result.adapters = adapters.loc[frame.index[kept]].tolist()
    return result, metadata


def _settings(config: Any, section: dict[str, Any]) -> TokenSettings:
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


def _task_columns(rows: Rows, settings: TokenSettings) -> list[str]:
    """Return the column of the rows' tasks, if there are tasks; a dataset without it is refused."""
    return [] if settings.tasks is None else [settings.tasks.found(rows.frame.columns, rows.source)]


def _tokenizer(section: dict[str, Any], rows: Rows, settings: TokenSettings, folder: str | None = None) -> RowTokenizer:
    """Return what makes tokens of these rows; the prompt is checked here."""
    columns = list(rows.frame.columns)
    prompt = (
        PlainPrompt(columns, retrieval.PROMPT_COLUMN)
        if retrieval.PROMPT_COLUMN in columns
        else prompt_of(section, settings.input_feature, columns, rows.source)
    )
    return RowTokenizer(settings, prompt, folder)


def _key(
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


def _for_ludwig(config: Any, **given: Any) -> dict[str, Any]:
    """Return the data arguments for Ludwig's own function: as given, or else those of a language model's config."""
    section = _as_dict(config)
    if section.get("model_type") != "llm" or any(given.get(option) is not None for option in DATASET_OPTIONS):
        return given
    sources = choose_sources(section, data_format=given["data_format"])
    found = {option: getattr(sources, option) for option in DATASET_OPTIONS if option in given}
    local = {option: resolve_local(path, option) for option, path in found.items() if path is not None}
    return {**given, **local, "data_format": sources.data_format}


def _load_metadata(metadata: Any) -> dict[str, Any]:
    """Return a copy of the metadata, read from a file where a path is given."""
    if isinstance(metadata, str):
        from ludwig.data.preprocessing import load_metadata

        metadata = load_metadata(metadata)
    return dict(metadata or {})


def _as_dict(config: Any) -> dict[str, Any]:
    result: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return result
