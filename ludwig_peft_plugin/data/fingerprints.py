"""What tokens depend on, as hashes of contents: data files and tables, the tokenizer, settings and versions."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import ludwig_peft_plugin
from ludwig_peft_plugin.data.lengths import LengthLimits
from ludwig_peft_plugin.data.prompts import prompt_section
from ludwig_peft_plugin.data.reading import format_of
from ludwig_peft_plugin.data.sources import DataSources, load_frames
from ludwig_peft_plugin.data.tasks import TaskColumn
from ludwig_peft_plugin.data.token_cache import FORMAT
from ludwig_peft_plugin.data.yaml_paths import DATASET_OPTIONS, is_uri, resolve_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of what reads, splits and tokenises.
_LIBRARIES = ("ludwig", "transformers", "tokenizers", "pandas", "pyarrow")
_READ_BY_SPLIT = ("split", "sample_ratio", "sample_size")
_ROWS = 1 << 16  # of a table that are hashed at once


def source_fingerprints(sources: DataSources) -> tuple[dict[str, str], dict[str, pd.DataFrame] | None]:
    """Return a hash of each source's content, and the tables where they had to be read for it.

    Local files are hashed as they are, without reading them as tables.

    Raises:
        DataError: a source is missing, or has to be read and cannot be.
    """
    given = {option: getattr(sources, option) for option in DATASET_OPTIONS if getattr(sources, option) is not None}
    if all(isinstance(value, str | os.PathLike) and not is_uri(os.fspath(value)) for value in given.values()):
        try:
            return {option: _path(value, option, sources.data_format) for option, value in given.items()}, None
        except OSError:  # reading it as a table fails too, and says what to do
            pass
    frames = load_frames(sources)
    return {option: table_fingerprint(frame) for option, frame in frames.items()}, frames


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's content, or of the names and contents of a folder's files."""
    if not os.path.isdir(path):
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(path)}\0{file_fingerprint(file)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def table_fingerprint(frame: pd.DataFrame) -> str:
    """Return a hash of a table's column names, index and cells."""
    total = hashlib.sha256(repr([(name, str(dtype)) for name, dtype in frame.dtypes.items()]).encode())
    for column in (frame.index.to_series(), *(frame[name] for name in frame.columns)):
        for start in range(0, len(column), _ROWS):
            total.update(_cells(column.iloc[start : start + _ROWS]))
    return total.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of everything a tokenizer is made of, wherever it lies; None where it cannot be written out."""
    kind = type(tokenizer)
    total = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\n".encode())
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.all_special_ids)
    total.update(repr((*tokens, getattr(tokenizer, "split_special_tokens", None))).encode())
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        total.update(backend.to_str().encode())
        return total.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (NotImplementedError, ValueError, OSError):
            return None
        total.update(file_fingerprint(folder).encode())
    return total.hexdigest()


def token_key(
    data: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    config: dict[str, Any],
    preprocessing: dict[str, Any],
    limits: LengthLimits,
    seed: int,
    tasks: TaskColumn | None = None,
) -> str | None:
    """Return the hash of everything that the tokens of a run depend on, None where the tokenizer has none.

    Args:
        data: `source_fingerprints`.
        tokenizer: the model's.
        config: a Ludwig config as a dict.
        preprocessing: its preprocessing section, merged with Ludwig's defaults.
        limits: how long rows may be.
        seed: for sampling and splitting.
        tasks: the column of the rows' tasks, if there are tasks.
    """
    identity = tokenizer_fingerprint(tokenizer)
    if identity is None:
        return None
    features = [config["input_features"][0], config["output_features"][0]]
    parts = {
        "data": data,
        "tokenizer": identity,
        "prompt": prompt_section(config, features[0]),
        "features": [(feature["column"], feature.get("preprocessing")) for feature in features],
        "split": {option: preprocessing.get(option) for option in _READ_BY_SPLIT},
        "limits": asdict(limits),
        "seed": seed,
        "format": FORMAT,
        "versions": {library: metadata.version(library) for library in _LIBRARIES},
        "plugin": ludwig_peft_plugin.__version__,
        "tasks": None if tasks is None else asdict(tasks),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _path(path: str | os.PathLike[str], option: str, data_format: str | None) -> str:
    """Return the hash of a local file's content and of what decides how it is read."""
    local = resolve_local(os.fspath(path), option)
    reading = (format_of(local, option, data_format), Path(local).suffixes)
    return hashlib.sha256(f"{reading!r}\n{file_fingerprint(local)}".encode()).hexdigest()


def _cells(column: pd.Series) -> bytes:
    """Return cells as bytes that differ where the cells do."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biufM":
        return column.to_numpy().tobytes()
    values = column.tolist()
    if all(type(value) is str for value in values):
        lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
        return lengths.tobytes() + "".join(values).encode("utf-8", "surrogatepass")
    return repr(values).encode("utf-8", "surrogatepass")
