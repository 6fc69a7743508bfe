"""Arrays that grow by appending, in memory as long as they are small and in a temporary file after that."""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

import numpy as np
import pyarrow as pa

from ludwig_peft_plugin.data.ragged import offsets_of
from ludwig_peft_plugin.errors import DataError

IN_MEMORY = 64 << 20  # bytes an array may have before it goes to a file


class Spool:
    """A flat array that grows by appending.

    The file has no name: the system removes it when the array is gone, however the process ends.

    Args:
        dtype: of the elements.
        folder: where the file would be; None is the system's folder for temporary files (`TMPDIR`).
    """

    def __init__(self, dtype: type[np.generic], folder: str | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, values: np.ndarray) -> None:
        """Add elements at the end, as a copy.

        Raises:
            DataError: the folder has no room.
        """
        part = np.ascontiguousarray(values, dtype=self._dtype)
        self._bytes += part.nbytes
        if self._file is not None:
            self._write([part])
            return
        self._parts.append(part.copy())
        if self._bytes > IN_MEMORY:
            self._move_to_file()

    def finish(self) -> np.ndarray:
        """Return all elements, shape (total,); read-only and mapped where they are in a file."""
        if self._file is None:
            parts, self._parts = self._parts, []
            return np.concatenate([np.zeros(0, dtype=self._dtype), *parts])
        self._write([])
        with self._file as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype=self._dtype)

    def _move_to_file(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (open until `finish`)
        except OSError as error:
            raise self._no_room(error) from error
        parts, self._parts = self._parts, []
        self._write(parts)

    def _write(self, parts: list[np.ndarray]) -> None:
        assert self._file is not None
        try:
            for part in parts:
                self._file.write(part.data)
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: OSError) -> DataError:
        folder = self._folder or tempfile.gettempdir()
        option = "LUDWIG_CACHE or the backend's cache_dir" if self._folder else "TMPDIR"
        return DataError(
            f"Tokens cannot be written to {folder} ({error.strerror or error}): {self._bytes:,} bytes and more are "
            f"needed while the program runs. Set {option} to a folder on a disk with room."
        )


class TextSpool:
    """A column of text that grows by appending."""

    def __init__(self, folder: str | None = None) -> None:
        self._bytes = Spool(np.uint8, folder)
        self._lengths = Spool(np.int32, folder)

    def append(self, texts: list[str]) -> None:
        """Add texts at the end."""
        column = pa.array(texts, type=pa.large_string())
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64, count=len(texts) + 1)
        self._lengths.append(np.diff(ends))
        if data is not None and ends[-1]:
            self._bytes.append(np.frombuffer(data, dtype=np.uint8, count=int(ends[-1])))

    def finish(self) -> pa.LargeStringArray:
        """Return all texts as an Arrow array, over the file where there is one."""
        lengths = self._lengths.finish()
        offsets, data = pa.py_buffer(offsets_of(lengths)), pa.py_buffer(self._bytes.finish())
        return pa.LargeStringArray.from_buffers(len(lengths), offsets, data)
