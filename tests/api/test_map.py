"""`Client.map`: words and bytes that all machines change in place."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

import ivshmemfs
from ivshmemfs import Client, MappedFile
from tests.support.mounts import PATIENCE
from tests.support.regions import TestRegion, new_region


def test_two_clients_see_one_memory(fs: Client, other: Client, made: TestRegion) -> None:
    with fs.map("/shared", create=10_000) as one, other.map("/shared") as two:
        assert (one.made, two.made) == (True, False)
        assert (one.offset, one.size) == (two.offset, two.size)
        assert one.size == 12_288
        assert two.read() == bytes(12_288)
        one.store(8, 77)
        assert two.load(8) == 77
        assert two.cas(8, 76, 1) == 77
        assert two.cas(8, 77, 78) == 77
        one.write(101, b"any bytes")
        one.fence()
        assert two.read(100, 11) == b"\0any bytes\0"
        assert other.read_bytes("/shared")[101:110] == b"any bytes"
        assert made.region(readonly=True).memory.read(one.offset + 101, 3) == b"any"


def test_a_file_as_memory_of_mmap(fs: Client, reader: Client) -> None:
    with fs.map("/shared", create=4096) as one:
        view = one.mmap()
        view[:5] = b"hello"
        assert one.read(0, 5) == b"hello"
        view.close()
    with reader.map("/shared") as two:
        view = two.mmap()
        assert view[:5] == b"hello"
        with pytest.raises(TypeError):
            view[:5] = b"other"
        view.close()
        with pytest.raises(OSError, match="read-only") as caught:
            two.store(0, 1)
        assert caught.value.errno == errno.EROFS


def test_a_file_that_took_the_regions_place_is_not_mapped(tmp_path: Path) -> None:
    """Its bytes would be another program's."""
    path = tmp_path / "region"
    with new_region(2 << 20) as made:
        shutil.copy(made.path, path)
    with ivshmemfs.open(path) as fs, fs.map("/shared", create=4096) as one:
        path.rename(tmp_path / "former")
        path.write_bytes(b"precious" * (2 << 17))
        one.write(0, b"hello")
        view = one.mmap()
        assert view[:5] == b"hello"
        view.close()
        os.truncate(tmp_path / "former", 4096)
        with pytest.raises(OSError, match="has taken"):
            one.mmap()
        fs.close()
        with pytest.raises(ValueError, match="closed"):
            one.mmap()


def _stores(one: MappedFile) -> None:
    """Store until that is refused."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        one.store(0, 1)
        time.sleep(0.01)


def test_a_file_that_was_released_meanwhile_is_lost(fs: Client, other: Client) -> None:
    """Its peer was evicted, so no slot listed the file; or the release was forced."""
    for forced in (False, True):
        one = fs.map("/shared", create=4096)
        if not forced:
            member, table = fs.session._fs._volume.joined(), other.session._fs.table
            with fs.session._lock:  # the upkeep thread sleeps
                table.retire(member.slot, table.state(member.slot))
                other.release("/shared")
        else:
            other.release("/shared", force=True)
        other.remove("/shared")
        with pytest.raises(OSError, match="was released") as caught:
            _stores(one)
        assert caught.value.errno == errno.ESTALE
        one.close()


def test_a_machine_without_one_memory_stores_nothing(fs: Client) -> None:
    """What it stored others might never see, and its swaps exclude no other's."""
    with fs.map("/shared", create=4096) as shared:
        shared.store(0, 7)
        member = fs.session._fs._volume.joined()
        member.unfit = "this machine does not share the memory"
        fs.session.call(shared.look_again)
        for call in (
            lambda: shared.store(0, 1), lambda: shared.cas(0, 7, 1), lambda: shared.write(0, b"x"),
        ):  # fmt: skip
            with pytest.raises(OSError, match="does not share") as caught:
                call()
            assert (caught.value.errno, caught.value.filename) == (errno.EROFS, "/shared")
        assert (shared.load(0), shared.read(0, 1)) == (7, b"\x07")
        with shared.mmap() as memory, pytest.raises(TypeError):
            memory[0] = 1
        member.unfit = ""
        fs.session.call(shared.look_again)
        shared.store(0, 8)


def test_a_region_formatted_anew_is_lost(fs: Client, made: TestRegion) -> None:
    one = fs.map("/shared", create=4096)
    with new_region(made.region().size) as fresh:
        content = fresh.path.read_bytes()
    with open(made.path, "r+b") as region:
        region.write(content)
    with pytest.raises(OSError, match="formatted anew") as caught:
        _stores(one)
    assert caught.value.errno == errno.ESTALE


def test_places_outside_raise(fs: Client) -> None:
    with fs.map("/shared", create=4096) as one:
        for at, length in ((-1, 1), (4096, 1), (4090, 7), (0, 4097), (-8, 8)):
            with pytest.raises(ValueError, match="not within"):
                one.read(at, length)
        for at in (-8, 4089, 4096, 1 << 70):
            with pytest.raises(ValueError, match="not within"):
                one.load(at)
        for call in (lambda: one.load(4), lambda: one.store(12, 0), lambda: one.wait(4, 0, 0)):
            with pytest.raises(ValueError, match=r"byte \d+ is not a multiple of 8"):
                call()
        with pytest.raises(ValueError, match="not within"):
            one.write(4000, bytes(100))
    assert one.closed
    with pytest.raises(ValueError, match="closed"):
        one.load(0)


def test_the_end_of_the_client_ends_it(fs: Client) -> None:
    one = fs.map("/shared", create=4096)
    fs.close()
    with pytest.raises(ValueError, match="closed"):
        one.load(0)
    one.close()


def test_what_cannot_be_mapped(fs: Client, reader: Client) -> None:
    fs.write_bytes("/plain", b"contents")
    fs.mkdir("/folder")
    cases: list[tuple[Client, str, int | None, int]] = [
        (fs, "/nothing", None, errno.ENOENT),
        (fs, "/plain", None, errno.EINVAL),
        (fs, "/plain", 4096, errno.EINVAL),
        (fs, "/folder", None, errno.EISDIR),
        (fs, "/nothing", 0, errno.EINVAL),
        (fs, "/nothing", 1 << 40, errno.ENOSPC),
        (fs, "/nothing", 1 << 63, errno.EFBIG),
        (reader, "/nothing", 4096, errno.EROFS),
    ]
    for client, path, size, code in cases:
        with pytest.raises(OSError) as caught:  # the errno is compared
            client.map(path, create=size)
        assert caught.value.errno == code, (path, size, caught.value)
        assert caught.value.filename == path
    fs.map("/shared", create=4096).close()
    with pytest.raises(FileExistsError, match="4096 bytes"):
        fs.map("/shared", create=8192)


def test_all_that_make_it_get_the_same(fs: Client, other: Client) -> None:
    """Programs on several machines start at once; one of them makes the file."""
    found: list[tuple[int, bool]]

    def ask(client: Client, path: str) -> None:
        with client.map(path, create=4096) as one:
            found.append((one.offset, one.made))

    for number in range(20):
        found, path = [], f"/q{number}"
        threads = [threading.Thread(target=ask, args=(client, path)) for client in (fs, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({offset for offset, _ in found}) == 1
        assert [made for _, made in found].count(True) == 1


def test_waiting_for_a_word(fs: Client, other: Client) -> None:
    with fs.map("/shared", create=4096) as one, other.map("/shared") as two:
        assert one.wait(0, 0, timeout=0.01) == 0
        assert one.wait(0, 1) == 0
        assert one.wait(0, 1, timeout=math.inf) == 0
        waker = threading.Timer(0.05, lambda: two.store(0, 5))
        waker.start()
        assert one.wait(0, 0, timeout=60) == 5
        waker.join()


def test_it_stays_until_it_is_released(fs: Client, other: Client) -> None:
    with fs.map("/shared", create=4096) as one:
        one.write(0, b"kept")
        for refused in (
            lambda: other.remove("/shared"),
            lambda: other.truncate("/shared", 0),
            lambda: other.write_bytes("/shared", b"new"),
            lambda: other.copy_in(os.devnull, "/shared"),
        ):
            with pytest.raises(OSError) as caught:  # the errno is compared
                refused()
            assert caught.value.errno in (errno.EPERM, errno.ETXTBSY)
        with pytest.raises(OSError, match="open or mapped") as caught:
            other.release("/shared")
        assert caught.value.errno == errno.EBUSY
    assert other.release("/shared")
    assert not other.release("/shared")
    assert other.read_bytes("/shared")[:4] == b"kept"
    other.remove("/shared")
    assert not fs.exists("/shared")
