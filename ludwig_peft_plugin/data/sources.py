"""Where the data come from: arguments or the config's dataset section; files, tables in memory, `ludwig://`, `hf://`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ludwig_peft_plugin.data.reading import format_of, read_source
from ludwig_peft_plugin.data.yaml_paths import DATASET_OPTIONS
from ludwig_peft_plugin.errors import DataError

__all__ = ["DataSources", "choose_sources", "combine", "describe_experiment", "load_frames"]

logger = logging.getLogger(__name__)

_RUNS_CODE = ("pickle",)
_HUB_PREFIXES = ("ludwig://", "hf://")


@dataclass(frozen=True)
class DataSources:
    """Either `dataset`, or `training_set` with or without the other two."""

    dataset: Any = None
    training_set: Any = None
    validation_set: Any = None
    test_set: Any = None
    data_format: str | None = None

    def __post_init__(self) -> None:
        """Refuse combinations in which something would be ignored."""
        given = [name for name in DATASET_OPTIONS if getattr(self, name) is not None]
        if "dataset" in given and len(given) > 1:
            raise DataError(
                f"dataset is split by preprocessing.split, so {' and '.join(given[1:])} would be ignored. Give either "
                "dataset alone, or training_set, validation_set and test_set."
            )
        if given and "dataset" not in given and "training_set" not in given:
            raise DataError(f"{' and '.join(given)} without training_set: there is nothing to train on.")


def choose_sources(
    config: dict[str, Any],
    dataset: Any = None,
    training_set: Any = None,
    validation_set: Any = None,
    test_set: Any = None,
    data_format: str | None = None,
) -> DataSources:
    """Return the sources given as arguments, or else those of the config's dataset section.

    If there is any argument, the section is ignored as a whole.

    Raises:
        DataError: neither gives data, or the two kinds are mixed (`dataset` beside `training_set`).
    """
    arguments = (dataset, training_set, validation_set, test_set)
    section = {option: config.get(option) for option in DATASET_OPTIONS if config.get(option) is not None}
    if any(argument is not None for argument in arguments):
        if section:
            logger.info("Data were given as arguments: the config's %s is not used.", " and ".join(section))
        return DataSources(*arguments, data_format=data_format)
    if not section:
        raise DataError(
            "There are no data to use: put `dataset: <path or URI>` into the config, or pass dataset (--dataset)."
        )
    if not data_format or data_format == "auto":
        data_format = config.get("data_format")
        if data_format in _RUNS_CODE:
            raise DataError(
                "data_format: pickle in a config is not read, because unpickling runs code that is in the file. "
                "Convert the data to parquet or csv, or pass data_format as an argument if you trust the file."
            )
    return DataSources(**section, data_format=data_format)


def load_frames(sources: DataSources) -> dict[str, pd.DataFrame]:
    """Return the table of each source that is given, by its option.

    Raises:
        DataError: a source is missing, unreadable or empty.
    """
    loaded = {option: getattr(sources, option) for option in DATASET_OPTIONS}
    if any(isinstance(value, str) and value.startswith(_HUB_PREFIXES) for value in loaded.values()):
        loaded = _load_uris(loaded)
    return {
        option: read_source(value, option, sources.data_format) for option, value in loaded.items() if value is not None
    }


def combine(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return all rows as one table; of separate sets with the column `split`: 0, 1 or 2 for the set a row is in."""
    if "dataset" in frames:
        return frames["dataset"]
    from ludwig.backend import LOCAL_BACKEND
    from ludwig.data.concatenate_datasets import concatenate_df

    training, validation, test = (frames.get(option) for option in DATASET_OPTIONS[1:])
    concatenate: Any = concatenate_df
    combined: pd.DataFrame = concatenate(training, validation, test, LOCAL_BACKEND)
    return combined


def describe_experiment(
    original: Callable[..., dict[str, Any]], config: dict[str, Any], **kwargs: Any
) -> dict[str, Any]:
    """Stand in for Ludwig's `get_experiment_description`, which knows only data that are given as arguments.

    Raises:
        DataError: there are no data, or their format is unknown.
    """
    if config.get("model_type") == "llm":
        given = {option: kwargs.get(option) for option in (*DATASET_OPTIONS, "data_format")}
        sources = choose_sources(config, **given)
        values = {option: getattr(sources, option) for option in DATASET_OPTIONS}
        kwargs |= {option: os.fspath(value) if _is_path(value) else value for option, value in values.items()}
        kwargs["data_format"] = _format_name(sources)
    return original(config, **kwargs)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _format_name(sources: DataSources) -> str:
    """Return what to call the format of the (first) source."""
    option = "dataset" if sources.dataset is not None else "training_set"
    value = getattr(sources, option)
    if not _is_path(value):
        return type(value).__name__
    path = os.fspath(value)
    if path.startswith(_HUB_PREFIXES):
        return path.partition("://")[0]
    return format_of(path, option, sources.data_format)


def _load_uris(sources: dict[str, Any]) -> dict[str, Any]:
    """Return the sources with `ludwig://` and `hf://` ones replaced by tables, through Ludwig's dataset loaders."""
    from ludwig.backend import LOCAL_BACKEND
    from ludwig.data.cache.types import CacheableDataset
    from ludwig.datasets import load_dataset_uris

    for option, value in sources.items():
        if isinstance(value, str) and value.startswith("ludwig://"):
            _require_known(value, option)
    load: Any = load_dataset_uris
    try:
        loaded = dict(zip(sources, load(*sources.values(), LOCAL_BACKEND), strict=True))
    except DataError:
        raise
    except Exception as error:  # the loaders of Ludwig and of the hub raise errors of many libraries
        asked = " and ".join(value for value in sources.values() if isinstance(value, str))
        raise DataError(f"{asked} cannot be loaded: {_first_line(error)}\n{_HUB_ADVICE}") from error
    for option, value in loaded.items():
        if not isinstance(value, CacheableDataset):
            continue
        frame: Any = value.unwrap()
        uri = sources[option]
        if frame is None or (frame.empty and option != "dataset"):
            logger.warning("%s: %s has no such split, so there is no %s.", option, uri, option)
            loaded[option] = None
            continue
        loaded[option] = _one_copy(frame, uri) if uri.startswith("hf://") else frame
    return loaded


_HUB_ADVICE = (
    "Check the name and your network (HF_ENDPOINT and HF_HUB_OFFLINE apply; gated data need `hf auth login`). "
    "A path to a local copy works without a hub."
)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _require_known(uri: str, option: str) -> None:
    """Raise DataError where Ludwig knows no dataset of this name."""
    from ludwig.datasets import list_datasets

    name, known = uri.removeprefix("ludwig://"), list_datasets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean ludwig://{close[0]}?" if close else ""
        raise DataError(f"{option}: Ludwig has no dataset {name!r}.{hint} `ludwig datasets list` shows all.")


def _one_copy(frame: pd.DataFrame, uri: str) -> pd.DataFrame:
    """Return one copy of a table that holds all its rows twice, as hub repositories with two formats of a file do."""
    half, odd = divmod(len(frame), 2)
    first, second = frame.iloc[:half], frame.iloc[half:]
    if odd or half < 2 or not first.reset_index(drop=True).equals(second.reset_index(drop=True)):
        return frame
    logger.warning(
        "%s holds the same %s rows twice, in the same order: the second copy was left out, because a split would put "
        "copies of training rows into the other sets.",
        uri,
        f"{half:,}",
    )
    return first
