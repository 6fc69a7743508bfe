"""Arrays that grow by appending, in memory and past it."""

import errno
import re
from pathlib import Path

import numpy as np
import pytest

from ludwig_peft_plugin.data import spool
from ludwig_peft_plugin.data.spool import Spool, TextSpool
from ludwig_peft_plugin.errors import DataError

PARTS = [np.arange(5), np.zeros(0, np.int64), np.arange(100, 130), np.arange(7)]


def mapped_files() -> set[str]:
    """The files of this process's memory map that have no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if line.endswith("(deleted)")}


@pytest.mark.parametrize("limit", [0, 100, 1 << 20])
def test_everything_comes_back_in_order(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(spool, "IN_MEMORY", limit)
    growing = Spool(np.int32, str(tmp_path))
    for part in PARTS:
        growing.append(part)
    array = growing.finish()
    assert array.dtype == np.int32
    assert array.tolist() == np.concatenate(PARTS).tolist()
    assert len(Spool(np.int32, str(tmp_path)).finish()) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_large_array_is_a_mapped_file_that_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 100)
    before = mapped_files()
    growing = Spool(np.int32, str(tmp_path))
    growing.append(np.arange(1000))
    array = growing.finish()
    assert not array.flags.writeable
    assert all(str(tmp_path) in name for name in mapped_files() - before)
    assert len(mapped_files() - before) == 1
    assert list(tmp_path.iterdir()) == [], "not even a file that a killed process would leave"
    del array
    assert mapped_files() == before


def test_what_is_appended_may_change_afterwards():
    growing, part = Spool(np.int32), np.arange(3, dtype=np.int32)
    growing.append(part)
    part[:] = 9
    assert growing.finish().tolist() == [0, 1, 2]


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_texts(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(spool, "IN_MEMORY", limit)
    texts = [["a", "", "naïve €"], [], ["\U0001f600\n", "x" * 1000], [""]]
    column = TextSpool(str(tmp_path))
    for part in texts:
        column.append(part)
    array = column.finish()
    array.validate(full=True)
    assert array.to_pylist() == [text for part in texts for text in part]
    assert TextSpool().finish().to_pylist() == []


@pytest.mark.parametrize(("named", "option"), [(True, "LUDWIG_CACHE"), (False, "TMPDIR")])
def test_a_folder_that_takes_no_file(tmp_path, monkeypatch, named, option):
    folder = str(tmp_path / "missing")
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    monkeypatch.setattr(spool.tempfile, "tempdir", folder)
    with pytest.raises(DataError, match=rf"cannot be written to {re.escape(folder)} .*Set {option}"):
        Spool(np.int32, folder if named else None).append(np.arange(10))


def test_a_full_disk(monkeypatch):
    class FullDisk:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda dir: FullDisk())
    with pytest.raises(DataError, match=r"No space left on device\): 40 bytes and more are needed"):
        Spool(np.int32).append(np.arange(10))
