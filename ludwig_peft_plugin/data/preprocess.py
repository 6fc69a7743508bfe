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
from ludwig.backend import LOCAL_BACKEND
from ludwig.constants import FULL, TEST, TRAINING, VALIDATION
from ludwig.data.dataset.base import Dataset
from ludwig.utils.defaults import default_random_seed

from ludwig_peft_plugin.adapters.several.rows import adapter_column, adapters_of_rows
from ludwig_peft_plugin.data.metadata import OWN_KEY, feature_metadata, random_seed_of, retrieval_index_of
from ludwig_peft_plugin.data.preprocess_inputs import (
    arguments_for_ludwig,
    config_dict,
    key_of_tokens,
    loaded_metadata,
    row_tokenizer,
    task_columns,
    token_settings,
)
from ludwig_peft_plugin.data.progress import RowProgress
from ludwig_peft_plugin.data.rows import Rows
from ludwig_peft_plugin.data.sources import choose_sources
from ludwig_peft_plugin.data.training_tokens import (
    find_sets,
    recorded_warnings,
    say_empty,
    token_cache,
    tokenize_sets,
)
from ludwig_peft_plugin.errors import DataError

TrainingData = tuple[Dataset, Dataset | None, Dataset | None, dict[str, Any]]


def is_text_to_text(config: Any) -> bool:
    """Return whether this is a language model that reads text and writes text, zero-shot or fine-tuned on targets."""
    config = config_dict(config)
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
            **arguments_for_ludwig(config, **given, test_set=test_set, data_format=data_format),
            training_set_metadata=training_set_metadata,
            skip_save_processed_input=skip_save_processed_input,
            backend=backend,
            random_seed=random_seed,
            callbacks=callbacks,
            **({} if preprocessing_params is None else {"preprocessing_params": preprocessing_params}),
        )
    section = config_dict(config)
    preprocessing = {**(section.get("preprocessing") or {}), **(preprocessing_params or {})}
    sources = choose_sources(section, dataset, training_set, validation_set, test_set, data_format)
    metadata = loaded_metadata(training_set_metadata)
    settings = token_settings(config, section)
    cache = token_cache(backend, skip_save=skip_save_processed_input)
    key, frames = key_of_tokens(cache, section, preprocessing, sources, settings, random_seed)
    sets, index_name = find_sets(cache, key), None
    if sets is None:
        with recorded_warnings() as warnings:
            rows = Rows(section, preprocessing, sources, random_seed, frames=frames)
            rows.require_targets()
            rows.render_retrieved(retrieval_index_of(metadata))
            tokenizer = row_tokenizer(section, rows, settings, None if key is None else cache.scratch_folder)
            rows.drop_unusable(tokenizer.prompt.columns, for_split=True, kept=task_columns(rows, settings))
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
            **arguments_for_ludwig(config, dataset=dataset, data_format=data_format),
            training_set_metadata=training_set_metadata,
            split=split,
            include_outputs=include_outputs,
            backend=backend,
            callbacks=callbacks,
        )
    if isinstance(dataset, Dataset):
        return dataset, training_set_metadata
    section = config_dict(config)
    metadata = loaded_metadata(training_set_metadata)
    seed = random_seed_of(metadata, default_random_seed)
    sources = choose_sources(section, dataset, data_format=data_format)
    preprocessing = section.get("preprocessing") or {}
    settings = token_settings(config, section)
    frames, named = None, adapter_column(section) is not None
    if split != FULL and include_outputs and not named:
        # Tokens of training are used again; those of other rows are not kept, as in stock Ludwig.
        cache = token_cache(backend, skip_save=True)
        key, frames = key_of_tokens(cache, section, preprocessing, sources, settings, seed)
        sets = find_sets(cache, key)
        if sets is not None and len(sets.rows[split]):
            return settings.dataset(sets.rows[split]), metadata
    rows = Rows(section, preprocessing, sources, seed, frames=frames, sample=split != FULL)
    if include_outputs:
        rows.require_targets()
    rows.render_retrieved(retrieval_index_of(metadata))
    tokenizer = row_tokenizer(section, rows, settings)
    adapters = adapters_of_rows(section, rows.frame, rows.source) if named else None
    rows.drop_unusable(
        tokenizer.prompt.columns,
        for_split=split != FULL,
        for_targets=include_outputs,
        kept=task_columns(rows, settings),
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
