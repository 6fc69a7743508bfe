"""Tokenised training data on disk, found again by the content of what they were made from.

One Arrow file holds one record batch a set (`token_rows.SCHEMA`), and in its schema's metadata what else a run needs to
know. Its name is `tokens-<key>-<checksum>.arrow`: the key is a hash of all that goes in (`fingerprints.py`), the
checksum is that of the file. A file is written under another name and then renamed, so that it is there as a whole or
not at all; of two processes that write the same one, either wins.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from ludwig_peft_plugin.data.token_rows import SCHEMA, TokenRows

logger = logging.getLogger(__name__)

FORMAT = 2
_FORMAT_KEY, _SETS_KEY = b"ludwig_peft_plugin.format", b"ludwig_peft_plugin.sets"
_NAME = re.compile(r"tokens-[0-9a-f]{32}-[0-9a-f]{8}\.arrow")
_PART = ".part"
_UNUSED_DAYS, _PART_DAYS = 30, 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TokenSets:
    """The tokenised rows of a run, and what making them showed.

    Attributes:
        rows: by set name (`training`, `validation`, `test`); a set can be empty.
        template_tokens: tokens of the prompt template's own text.
        longest_prompt: most tokens of a prompt.
        longest_target: most tokens of a target.
        warnings: what was said about the rows (dropped, cut, ...), to be said again when they are used again.
    """

    rows: dict[str, TokenRows]
    template_tokens: int
    longest_prompt: int
    longest_target: int
    warnings: list[str] = field(default_factory=list)


class TokenCache:
    """The files in one folder.

    Args:
        folder: where they are; it need not exist.
        may_write: whether new ones are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], *, may_write: bool) -> None:
        self.folder = Path(folder)
        self.may_write = may_write

    @property
    def is_useful(self) -> bool:
        """Whether something may be found or kept, so that it is worth asking for a key."""
        return self.may_write or any(self._files())

    @property
    def scratch_folder(self) -> str | None:
        """Where tokens go until they are kept; None, the system's folder for temporary files, where none are."""
        if not self.may_write:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # `keep` says so
            return None
        return str(self.folder) if os.access(self.folder, os.W_OK) else None

    def find(self, key: str) -> tuple[TokenSets, Path] | None:
        """Return what was kept under `key` and the file it is in, mapped into memory; None where there is nothing.

        A file that is damaged is removed with a warning.
        """
        for path in self._files(key):
            try:
                _check(path)
                sets = _read(path)
            except FileNotFoundError:  # removed by another process
                continue
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("The kept tokens %s cannot be used (%s): they are made again.", path, reason)
                with suppress(OSError):
                    path.unlink()
                continue
            with suppress(OSError):  # a folder that is only read keeps the time of its files
                os.utime(path)
            return sets, path
        return None

    def keep(self, key: str, sets: TokenSets) -> TokenSets:
        """Write `sets` under `key`, and return them mapped into memory from there.

        Where nothing can be written there is a warning, and `sets` come back as they are.
        """
        part = self.folder / f".tokens-{key}-{os.getpid()}-{secrets.token_hex(4)}{_PART}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unused()
            _write(part, sets)
            path = self.folder / f"tokens-{key}-{_checksum(part)}.arrow"
            part.replace(path)
            kept = _read(path)
        except OSError as error:
            logger.warning("Tokens are not kept for the next run, because %s cannot be written: %s.", part, error)
            return sets
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        megabytes = path.stat().st_size / 1e6
        logger.info("Tokens are kept for runs with the same data and settings: %s (%.1f MB)", path, megabytes)
        return kept

    def _files(self, key: str = "*") -> Iterator[Path]:
        return (path for path in sorted(self.folder.glob(f"tokens-{key}-*.arrow")) if _NAME.fullmatch(path.name))

    def _remove_unused(self) -> None:
        """Remove what no run has used for a month, and what broken-off runs have left."""
        now = time.time()
        stale = [(path, _UNUSED_DAYS) for path in self._files()]
        stale += [(path, _PART_DAYS) for path in self.folder.glob(f".tokens-*{_PART}")]
        for path, days in stale:
            with suppress(OSError):  # another process removes it, or another user owns it
                if now - path.stat().st_mtime > days * 86_400:
                    path.unlink()


def _write(path: Path, sets: TokenSets) -> None:
    described = {
        "names": list(sets.rows),
        "template_tokens": sets.template_tokens,
        "longest_prompt": sets.longest_prompt,
        "longest_target": sets.longest_target,
        "warnings": sets.warnings,
    }
    schema = SCHEMA.with_metadata({_FORMAT_KEY: str(FORMAT), _SETS_KEY: json.dumps(described)})
    options = pa.ipc.IpcWriteOptions(allow_64bit=True)  # sets of more than 2^31 tokens
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for rows in sets.rows.values():
            writer.write_batch(rows.to_batch().replace_schema_metadata(schema.metadata))
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())  # a rename that survives a power cut must not outlive the content


def _read(path: Path) -> TokenSets:
    """Return a file's sets, mapped into memory."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = reader.schema.metadata or {}
    if metadata.get(_FORMAT_KEY) != str(FORMAT).encode() or not reader.schema.equals(SCHEMA):
        raise ValueError("another format")
    described = json.loads(metadata[_SETS_KEY])
    names = described.pop("names")
    if len(names) != reader.num_record_batches:
        raise ValueError(f"{reader.num_record_batches} sets instead of {len(names)}")
    batches = (reader.get_batch(number) for number in range(len(names)))
    return TokenSets(rows=dict(zip(names, map(TokenRows.from_batch, batches), strict=True)), **described)


def _check(path: Path) -> None:
    """Raise ValueError where a file's content is not that of its checksum."""
    if _checksum(path) != path.stem.rpartition("-")[2]:
        raise ValueError("its content has changed since it was written")


def _checksum(path: Path) -> str:
    checksum = 0
    with open(path, "rb", buffering=0) as stream:
        block = memoryview(bytearray(_BLOCK))
        while count := stream.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return f"{checksum:08x}"
