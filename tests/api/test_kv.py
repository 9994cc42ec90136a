"""The key-value view: plain files, whole batches, and no stale value on another machine."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs import Client, Item
from ivshmemfs.api.kv import BATCH_MAX, VALUE_MAX, key_of, name_of
from tests.support.mounts import ENVIRONMENT
from tests.support.regions import TestRegion


def test_values_are_plain_files(fs: Client, other: Client) -> None:
    cache = fs.kv("/a/cache")
    cache["one"] = b"1"
    assert other.read_bytes("/a/cache/one") == b"1"
    other.write_bytes("/a/cache/two", b"2")
    other.mkdir("/a/cache/folder")
    other.symlink("one", "/a/cache/link")
    assert cache["two"] == b"2"
    assert sorted(cache.scan()) == ["one", "two"]
    assert cache.get("folder") is None
    assert cache.get("link") is None
    assert "one" in cache
    assert "three" not in cache
    assert cache.get("three", b"default") == b"default"


def test_removing(fs: Client) -> None:
    cache = fs.kv("/cache")
    cache.set_many({"a": b"1", "b": b"2", "c": b"3"})
    assert cache.delete("a")
    assert not cache.delete("a")
    with pytest.raises(KeyError):
        del cache["a"]
    with pytest.raises(KeyError):
        cache["a"]
    assert cache.clear() == 2
    assert fs.listdir("/cache") == []


@given(st.binary(min_size=1, max_size=80))
def test_every_key_has_a_legal_name_and_comes_back(key: bytes) -> None:
    name = name_of(key)
    assert b"/" not in name
    assert b"\0" not in name
    assert name not in (b".", b"..")
    assert key_of(name) == key


@given(st.binary(min_size=1, max_size=80), st.binary(min_size=1, max_size=80))
def test_two_keys_have_two_names(one: bytes, other: bytes) -> None:
    assert (name_of(one) == name_of(other)) is (one == other)


def test_odd_keys(fs: Client) -> None:
    cache = fs.kv("/cache")
    keys = ["a/b", "..", ".", "%", "100%", "%41", "zwölf", "new\nline", "nul\0", " ", "\udcff"]
    cache.set_many({key: key.encode(errors="surrogateescape") for key in keys})
    assert sorted(cache.scan()) == sorted(keys)
    assert cache.get_many(keys) == {k: k.encode(errors="surrogateescape") for k in keys}
    fs.write_bytes("/cache/50%", b"no key has this name")
    assert "50%" not in cache
    with pytest.raises(ValueError, match="empty"):
        cache.get("")
    for use in (lambda key: cache.set(key, b""), cache.get, cache.get_item, cache.__contains__):
        with pytest.raises(OSError, match="too long") as caught:
            use("k" * 256)
        assert caught.value.errno == errno.ENAMETOOLONG


def test_scan_by_prefix(fs: Client) -> None:
    cache = fs.kv("/cache")
    cache.set_many({f"user:{n}": b"" for n in range(300)} | {"other": b""})
    assert len(list(cache.scan("user:"))) == 300
    assert list(cache.scan("o")) == ["other"]


def test_large_values(fs: Client) -> None:
    cache = fs.kv("/cache")
    cache["max"] = bytes(VALUE_MAX)
    assert len(cache["max"]) == VALUE_MAX
    with pytest.raises(OSError, match="one commit") as caught:
        cache["more"] = bytes(VALUE_MAX + 1)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="one commit"):
        cache.set_many({"a": bytes(VALUE_MAX), "b": b"x"})
    with pytest.raises(OSError, match="values") as caught:
        cache.set_many(dict.fromkeys(map(str, range(BATCH_MAX + 1)), b""))
    assert caught.value.errno == errno.E2BIG
    fs.write_bytes("/cache/foreign", bytes(VALUE_MAX + 1))
    for use in (cache.get, cache.get_item):
        with pytest.raises(OSError, match="more than") as caught:
            use("foreign")
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, "/cache/foreign")
    assert "foreign" in cache
    assert sorted(cache.scan()) == ["foreign", "max"]


def test_notes_and_versions(fs: Client) -> None:
    cache = fs.kv("/cache")
    cache.set("k", b"value", note=b"note")
    first = cache.get_item("k")
    assert first is not None
    assert first[:2] == (b"value", b"note")
    cache.set("k", b"value", note=b"note")
    second = cache.get_item("k")
    assert second is not None
    assert second.version != first.version
    assert cache.get_item("k") == second
    cache.set("k", b"value")
    assert cache.get_item("k")[1] == b""  # type: ignore[index]


def test_one_version_is_removed(fs: Client, other: Client) -> None:
    cache = fs.kv("/cache")
    cache["k"] = b"old"
    old = cache.get_item("k")
    assert old is not None
    other.kv("/cache")["k"] = b"new"
    assert not cache.delete("k", old.version)
    assert cache["k"] == b"new"
    new = cache.get_item("k")
    assert new is not None
    assert cache.delete("k", new.version)
    assert "k" not in cache
    fs.mkdir("/cache/folder")
    assert not cache.delete("folder")


def test_a_deleted_value_stays_readable_where_it_is_open(fs: Client, other: Client) -> None:
    cache = fs.kv("/cache")
    cache["k"] = bytes(50_000)
    with other.open("/cache/k", "rb") as file:
        assert cache.delete("k")
        assert file.read() == bytes(50_000)


def test_no_update_is_lost(fs: Client, other: Client) -> None:
    caches = [fs.kv("/cache"), other.kv("/cache")] * 2
    caches[0]["n"] = b"0"

    def add_one(old: Item | None) -> Item | None:
        assert old is not None
        return Item(b"%d" % (int(old.value) + 1))

    def count(number: int) -> None:
        for _ in range(25):
            caches[number].update("n", add_one)

    threads = [threading.Thread(target=count, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caches[0]["n"] == b"100"


def test_update_may_change_nothing(fs: Client) -> None:
    cache = fs.kv("/cache")
    assert cache.update("none", lambda _old: None) is None
    assert "none" not in cache


@pytest.mark.parametrize("raised", [ValueError("no number"), FileNotFoundError(2, "no file")])
def test_what_an_update_raises_reaches_the_caller(fs: Client, raised: Exception) -> None:
    cache = fs.kv("/cache")
    cache["k"] = b"old"
    cause = KeyError("why")

    def fail(_old: Item | None) -> Item | None:
        raise raised from cause

    with pytest.raises(type(raised)) as caught:
        cache.update("k", fail)
    assert caught.value is raised
    assert raised.__cause__ is cause
    assert cache["k"] == b"old"


def test_a_batch_is_seen_whole_or_not_at_all(fs: Client, other: Client) -> None:
    writing, reading = fs.kv("/cache"), other.kv("/cache")
    keys = [f"k{number}" for number in range(8)]
    writing.set_many(dict.fromkeys(keys, b"0"))
    end = threading.Event()

    def write() -> None:
        number = 0
        while not end.is_set():
            number += 1
            writing.set_many(dict.fromkeys(keys, b"%d" % number))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(200):
            assert len(set(reading.get_many(keys).values())) == 1
    finally:
        end.set()
        thread.join()


def test_the_directory_may_be_moved_and_made_anew(fs: Client, other: Client) -> None:
    cache = fs.kv("/cache")
    cache["k"] = b"1"
    other.rename("/cache", "/old")
    with pytest.raises(FileNotFoundError) as caught:
        cache.get("k")
    assert caught.value.filename == "/cache/k"
    other.mkdir("/cache")
    assert cache.get("k") is None


_ECHO = """if True:
    import ivshmemfs, sys
    with ivshmemfs.open(sys.argv[1], readonly=sys.argv[2] == "reader") as fs:
        cache = fs.kv("/cache")
        for line in sys.stdin:
            word = line.split()
            if word[0] == "set":
                cache.set(word[1], word[2].encode())
            print(cache.get(word[1]).decode(), flush=True)
"""


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_no_value_is_stale_once_set_returned_in_another_process(
    made: TestRegion, fs: Client, kind: str
) -> None:
    cache = fs.kv("/cache")
    with subprocess.Popen(
        [sys.executable, "-c", _ECHO, made.path, kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(line: str) -> str:
            assert child.stdin is not None
            assert child.stdout is not None
            print(line, file=child.stdin, flush=True)
            return child.stdout.readline().strip()

        for number in range(300):
            cache.set("k", b"%d" % number)
            assert ask("get k") == str(number)
            if kind == "writer":
                assert ask(f"set k theirs-{number}") == f"theirs-{number}"
                assert cache["k"] == b"theirs-%d" % number
        child.stdin.close()
        assert child.wait(20) == 0
