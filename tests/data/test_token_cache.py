"""Tokens kept on disk: found as they were, whole or not at all."""

import logging
import os
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_cache import TokenCache, TokenSets
from ludwig_peft_plugin.data.token_rows import TokenRowsWriter

KEY, OTHER = "0" * 32, "1" * 32


def rows(count, start=0):
    writer = TokenRowsWriter(targets=True)
    lists = [[start + row] * (row + 2) for row in range(count)]
    writer.add(
        Ragged.from_lists(lists),
        np.ones(count, np.int32),
        [f"prompt {row} é" for row in range(count)],
        [f"target {row}" for row in range(count)],
    )
    return writer.finish()


def sets(count=5, warnings=()):
    built = {"training": rows(count), "validation": rows(2, 50), "test": rows(0)}
    return TokenSets(built, 3, 7, 11, list(warnings))


def as_lists(kept):
    return {
        name: (
            [row.tolist() for row in part.tokens],
            part.prompt_lengths.tolist(),
            part.prompts.to_pylist(),
            part.targets.to_pylist(),
        )
        for name, part in kept.rows.items()
    }


def in_file(address):
    """Whether an address is one of a mapped file of tokens."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= address < last:
                return ".arrow" in line
    return False


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "cache" / "tokens", may_write=True)


def test_what_is_kept_is_found(cache):
    assert cache.find(KEY) is None
    kept = cache.keep(KEY, sets(warnings=["2 rows are dropped", "100% of é"]))
    found, path = cache.find(KEY)
    for result in (kept, found):
        assert as_lists(result) == as_lists(sets())
        assert (result.template_tokens, result.longest_prompt, result.longest_target) == (3, 7, 11)
        assert result.warnings == ["2 rows are dropped", "100% of é"]
        training = result.rows["training"]
        assert training.tokens.values.dtype == training.prompt_lengths.dtype == np.int32
        assert training.tokens.offsets.dtype == np.int64
        for array in (training.tokens.values, training.tokens.offsets, training.prompt_lengths):
            assert in_file(array.__array_interface__["data"][0])
        for texts in (training.prompts, training.targets):
            assert in_file(texts.buffers()[2].address)
        assert not training.tokens.values.flags.writeable
    assert list(cache.folder.iterdir()) == [path]
    assert cache.find(OTHER) is None


def test_any_arrow_reader_can_read_it(cache):
    cache.keep(KEY, sets())
    table = pa.ipc.open_file(cache.find(KEY)[1]).read_all()
    table.validate(full=True)
    assert table.column_names == ["tokens", "prompt_length", "prompt", "target", "task"]
    assert table["tokens"].to_pylist()[1] == [1, 1, 1]
    assert len(table) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content[:-900] + bytes([content[-900] ^ 1]) + content[-899:],
        lambda content: content + b"x",
    ],
    ids=["cut", "empty", "zeros", "one bit", "longer"],
)
def test_a_damaged_file_is_removed_with_a_warning(cache, caplog, damage):
    cache.keep(KEY, sets())
    path = cache.find(KEY)[1]
    path.write_bytes(damage(path.read_bytes()))
    assert cache.find(KEY) is None
    assert f"The kept tokens {path} cannot be used" in caplog.text
    assert "made again" in caplog.text
    assert not path.exists()
    cache.keep(KEY, sets())
    assert as_lists(cache.find(KEY)[0]) == as_lists(sets())


def test_a_whole_file_of_another_kind(cache, caplog):
    import zlib

    cache.folder.mkdir(parents=True)
    table = pa.table({"tokens": [1]})
    part = cache.folder / "part"
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path = cache.folder / f"tokens-{KEY}-{zlib.crc32(part.read_bytes()):08x}.arrow"
    part.rename(path)
    assert cache.find(KEY) is None
    assert "(another format)" in caplog.text


def test_a_run_broken_off_while_writing_leaves_nothing_to_find(cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.keep(KEY, sets())
    assert cache.find(KEY) is None
    assert list(cache.folder.iterdir()) == []


def test_many_at_once(cache):
    """Writers and readers of the same key: a reader sees nothing or all of it, never a part."""
    expected, seen, errors = as_lists(sets(200)), [], []

    def work():
        try:
            own = TokenCache(cache.folder, may_write=True)
            for _ in range(10):
                own.keep(KEY, sets(200))
                found = own.find(KEY)
                seen.append(found is not None and as_lists(found[0]) == expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen == [True] * 40
    assert len(list(cache.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = TokenCache(tmp_path / "file" / "tokens", may_write=True)
    given = sets()
    assert cache.keep(KEY, given) is given
    assert "Tokens are not kept for the next run" in caplog.text
    assert cache.scratch_folder is None
    assert cache.find(KEY) is None


def test_a_cache_that_is_only_read(cache):
    reader = TokenCache(cache.folder, may_write=False)
    assert not reader.is_useful
    assert reader.scratch_folder is None
    cache.keep(KEY, sets())
    assert reader.is_useful
    assert as_lists(reader.find(KEY)[0]) == as_lists(sets())


def test_files_that_nobody_has_used_for_a_month_go(cache):
    def age(path, days):
        past = time.time() - days * 86_400
        os.utime(path, (past, past))

    cache.keep(KEY, sets())
    old = cache.find(KEY)[1]
    part, young, foreign = (
        cache.folder / name for name in (f".tokens-{KEY}-1-aa.part", f".tokens-{KEY}-2-bb.part", "notes.arrow")
    )
    for path in (part, young, foreign):
        path.write_text("")
    age(foreign, 100)
    age(part, 2)
    age(old, 29)
    cache.keep(OTHER, sets())
    assert old.exists()
    age(old, 31)
    assert cache.find(KEY) is not None, "a use makes it young again"
    cache.keep(OTHER, sets())
    assert old.exists()
    age(old, 31)
    cache.keep(OTHER, sets())
    assert not old.exists()
    assert not part.exists()
    assert young.exists()
    assert foreign.exists()


def test_warnings_are_logged_once_by_keep(cache, caplog):
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        cache.keep(KEY, sets())
    (message,) = caplog.messages
    assert str(cache.find(KEY)[1]) in message
