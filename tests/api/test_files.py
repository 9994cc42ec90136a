"""Open files: the classes of `io`, positions, buffers, and appends of several machines."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from ivshmemfs import Client

MIB = 1 << 20


@pytest.mark.parametrize(
    ("mode", "buffering", "kind"),
    [
        ("r", -1, io.TextIOWrapper),
        ("rb", -1, io.BufferedReader),
        ("wb", -1, io.BufferedWriter),
        ("ab", 100, io.BufferedWriter),
        ("r+b", -1, io.BufferedRandom),
        ("w+", 1, io.TextIOWrapper),
        ("rb", 0, io.RawIOBase),
    ],
)
def test_a_mode_gives_the_same_class_as_open(
    fs: Client, tmp_path: Path, mode: str, buffering: int, kind: type
) -> None:
    fs.write_bytes("/f", b"contents")
    (tmp_path / "f").write_bytes(b"contents")
    with fs.open("/f", mode, buffering) as ours, open(tmp_path / "f", mode, buffering) as theirs:
        assert (isinstance(ours, kind), isinstance(theirs, kind)) == (True, True)
        for question in ("readable", "writable", "seekable", "tell"):
            assert getattr(ours, question)() == getattr(theirs, question)()
        assert ours.mode == theirs.mode
        assert ours.name == "/f"


@pytest.mark.parametrize("mode", ["", "rw", "rr", "b", "q", "rbt", "r++", "Ur"])
def test_modes_that_mean_nothing(fs: Client, mode: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        fs.open("/f", mode)
    with pytest.raises(ValueError, match="unbuffered text"):
        fs.open("/f", "r", 0)
    with pytest.raises(ValueError, match="binary mode"):
        fs.open("/f", "rb", encoding="utf-8")


def test_random_operations_do_what_a_local_file_does(fs: Client, tmp_path: Path) -> None:
    chance = random.Random(5)
    buffering: Any = chance.choice([-1, 64])
    with open(tmp_path / "f", "w+b") as local, fs.open("/f", "w+b", buffering) as ours:
        for _ in range(400):
            length = chance.choice([1, 10, 5000, 70_000])
            where = chance.randrange(200_000)
            data = chance.randbytes(length)
            match chance.randrange(7):
                case 0:
                    assert ours.seek(where) == local.seek(where)
                case 1:
                    assert ours.read(length) == local.read(length)
                case 2 | 3:
                    assert ours.write(data) == local.write(data)
                case 4:
                    assert ours.truncate(where) == local.truncate(where)
                case 5:
                    assert ours.seek(0, os.SEEK_END) == local.seek(0, os.SEEK_END)
                case 6:
                    into, there = bytearray(length), bytearray(length)
                    assert ours.readinto(into) == local.readinto(there)
                    assert into == there
            assert ours.tell() == local.tell()
    assert fs.read_bytes("/f") == (tmp_path / "f").read_bytes()


def test_text(fs: Client) -> None:
    with fs.open("/t", "w", encoding="utf-16", newline="\r\n") as file:
        file.write("eins\nzwei\n")
    with fs.open("/t", encoding="utf-16") as file:
        assert list(file) == ["eins\n", "zwei\n"]
    with fs.open("/t", "a", encoding="utf-16") as file:
        print("drei", file=file)
    with fs.open("/t", encoding="utf-16") as file:
        assert file.read() == "eins\nzwei\ndrei\n"


def test_seeking(fs: Client) -> None:
    with fs.open("/f", "w+b", 0) as raw:
        raw.write(b"start")
        raw.seek(MIB)
        raw.write(b"end")
        assert raw.seek(0, os.SEEK_DATA) == 0
        assert 0 < raw.seek(0, os.SEEK_HOLE) < MIB
        assert raw.seek(-3, os.SEEK_END) == MIB
        assert raw.read() == b"end"
        with pytest.raises(OSError, match="Invalid") as caught:
            raw.seek(-1)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="whence"):
            raw.seek(0, 9)


def test_what_a_file_is_not_open_for(fs: Client) -> None:
    with fs.open("/f", "wb", 0) as raw, pytest.raises(io.UnsupportedOperation):
        raw.read(1)
    with fs.open("/f", "rb", 0) as raw:
        with pytest.raises(io.UnsupportedOperation):
            raw.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            raw.truncate()
        with pytest.raises(OSError, match="fileno"):
            raw.fileno()
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)


def test_one_raw_write_is_one_commit_of_up_to_1_mib(fs: Client, other: Client) -> None:
    with fs.open("/f", "wb", 0) as raw:
        assert raw.write(bytes(3 * MIB)) == MIB
        assert other.stat("/f").st_size == MIB
    with fs.open("/f", "wb") as buffered:
        assert buffered.write(bytes(3 * MIB)) == 3 * MIB
    assert other.stat("/f").st_size == 3 * MIB


def test_buffered_bytes_arrive_with_flush(fs: Client, other: Client) -> None:
    with fs.open("/f", "wb") as file:
        file.write(b"later")
        assert other.read_bytes("/f") == b""
        file.flush()
        assert other.read_bytes("/f") == b"later"


def test_a_removed_file_stays_readable(fs: Client, other: Client) -> None:
    fs.write_bytes("/f", b"still here")
    with fs.open("/f", "rb") as file:
        other.remove("/f")
        assert file.read() == b"still here"
        assert file.raw.stat().st_nlink == 0  # type: ignore[attr-defined]
    assert fs.session.call(lambda engine: engine.view().root.record.orphans) == 0


def test_no_append_is_lost_or_torn(fs: Client, other: Client) -> None:
    lines, each = 60, 4
    clients = [fs, other, fs, other]

    def append(number: int) -> None:
        with clients[number].open("/log", "ab", 0) as raw:
            for line in range(lines):
                text = f"{number} {line} {'x' * 500 * number}\n".encode()
                assert raw.write(text) == len(text)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [line.split(" ") for line in fs.read_text("/log").splitlines()]
    assert all(words[2] == "x" * 500 * int(words[0]) for words in got)
    assert len(got) == each * lines
    for number in range(each):
        own = [int(words[1]) for words in got if words[0] == str(number)]
        assert own == list(range(lines))


def test_the_position_after_an_append_is_the_end(fs: Client) -> None:
    fs.write_bytes("/f", b"12345")
    with fs.open("/f", "ab", 0) as raw:
        assert raw.tell() == 5
        raw.seek(0)
        raw.write(b"67")
        assert raw.tell() == 7
    with fs.open("/f", "a+b") as file:
        assert file.tell() == 7
        file.seek(0)
        assert file.read() == b"1234567"


def test_exclusive_creation_works_as_a_lock(fs: Client, other: Client) -> None:
    won = []

    def attempt(client: Client) -> None:
        try:
            client.open("/lock", "xb").close()
            won.append(client)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=attempt, args=(client,)) for client in (fs, other) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
