"""The fsspec adapter, by fsspec's own tests of an implementation and some more."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import fsspec.tests.abstract as abstract
import pytest
from fsspec.callbacks import Callback

from ivshmemfs.api.fsspec_adapter import IvshmemFileSystem
from tests.support.regions import TestRegion


class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc]  # fsspec has no types
    @pytest.fixture
    def fs(self, made: TestRegion) -> Iterator[IvshmemFileSystem]:
        fs = IvshmemFileSystem(str(made.path), auto_mkdir=True, skip_instance_cache=True)
        yield fs
        fs.client.close()

    @pytest.fixture
    def fs_path(self) -> str:
        return "/top"

    @pytest.fixture
    def fs_sanitize_path(self) -> Callable[[str], str]:
        return lambda path: path


class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


@pytest.fixture
def spec(made: TestRegion) -> Iterator[IvshmemFileSystem]:
    fs = IvshmemFileSystem(str(made.path), skip_instance_cache=True)
    yield fs
    fs.client.close()


def test_the_entry_point_names_the_class() -> None:
    (entry,) = [
        point for point in importlib.metadata.entry_points(group="fsspec.specs")
        if point.name == "ivshmemfs"
    ]  # fmt: skip
    assert entry.load() is IvshmemFileSystem


def test_a_url_opens_a_file(made: TestRegion) -> None:
    fsspec.register_implementation("ivshmemfs", IvshmemFileSystem, clobber=True)
    try:
        with fsspec.open("ivshmemfs://a/b", "w", region=str(made.path), auto_mkdir=True) as file:
            file.write("text")
        with fsspec.open("ivshmemfs:///a/b", "r", region=str(made.path)) as file:
            assert file.read() == "text"
        fs = fsspec.filesystem("ivshmemfs", region=str(made.path))
        assert fs is fsspec.filesystem("ivshmemfs", region=str(made.path))  # one peer
        assert fs.unstrip_protocol("/a/b") == "ivshmemfs:///a/b"
        assert pickle.loads(pickle.dumps(fs)).cat("/a/b") == b"text"
    finally:
        for instance in IvshmemFileSystem._cache.values():
            instance.client.close()
        IvshmemFileSystem.clear_instance_cache()


def test_without_auto_mkdir_directories_must_exist(spec: IvshmemFileSystem) -> None:
    with pytest.raises(FileNotFoundError):
        spec.pipe_file("/a/b", b"")
    spec.mkdir("/a/b/c")
    assert spec.ls("/a", detail=False) == ["/a/b"]
    with pytest.raises(FileNotFoundError):
        spec.mkdir("/x/y", create_parents=False)
    with pytest.raises(FileExistsError):
        spec.makedirs("/a/b")


def test_attributes(spec: IvshmemFileSystem) -> None:
    before = datetime.now(tz=UTC).timestamp() - 1
    spec.pipe_file("/f", b"12345")
    spec.symlink("f", "/link")
    spec.symlink("none", "/broken")
    spec.mkdir("/d")
    assert spec.info("/f")["size"] == spec.size("/f") == 5
    link = spec.info("/link")
    assert (link["type"], link["islink"], link["destination"]) == ("file", True, "f")
    kinds = {one["name"]: one["type"] for one in spec.ls("/")}
    assert kinds == {"/f": "file", "/link": "file", "/broken": "other", "/d": "directory"}
    assert spec.ls("/f", detail=False) == ["/f"]
    assert spec.modified("/f").timestamp() > before
    assert spec.created("/f").timestamp() > before
    assert (spec.isfile("/f"), spec.isdir("/d"), spec.islink("/link")) == (True, True, True)
    assert (spec.exists("/broken"), spec.lexists("/broken")) == (False, True)
    key = spec.ukey("/f")
    spec.pipe_file("/f", b"54321")
    assert spec.ukey("/f") != key


def test_a_link_to_a_directory_above_is_no_endless_tree(spec: IvshmemFileSystem) -> None:
    spec.makedirs("/d/e")
    spec.pipe_file("/d/e/f", b"")
    spec.symlink("..", "/d/e/up")
    assert spec.find("/") == ["/d/e/f", "/d/e/up"]
    assert spec.isdir("/d/e/up")


def test_parts_of_a_file(spec: IvshmemFileSystem) -> None:
    data = os.urandom(100_000)
    spec.pipe_file("/f", data)
    for start, end in (
        (None, None),
        (5, None),
        (None, 10),
        (7, 70_000),
        (-10, None),
        (-10, -2),
        (9, 3),
    ):
        assert spec.cat_file("/f", start, end) == data[start:end]
    assert spec.cat_ranges(["/f", "/f"], [0, 5], [2, 9]) == [data[:2], data[5:9]]
    assert spec.head("/f", 3) == data[:3]


def test_moving_and_removing(spec: IvshmemFileSystem) -> None:
    spec.makedirs("/d/below")
    spec.pipe_file("/d/f", b"1")
    spec.mv("/d", "/e")
    spec.pipe_file("/g", b"2")
    spec.mv("/g", "/e")
    spec.link("/e/g", "/h")
    assert sorted(spec.find("/")) == ["/e/f", "/e/g", "/h"]
    assert spec.glob("/e/*") == ["/e/below", "/e/f", "/e/g"]
    with pytest.raises(IsADirectoryError):
        spec.rm("/e")
    spec.rm(["/e", "/h"], recursive=True)
    assert spec.ls("/") == []


def test_copies_tell_their_progress(spec: IvshmemFileSystem, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(3_000_000))
    up, down = Callback(), Callback()
    spec.put_file(str(tmp_path / "in"), "/f", callback=up)
    spec.get_file("/f", str(tmp_path / "out"), callback=down)
    assert (up.size, up.value, down.size, down.value) == (3_000_000,) * 4
    with pytest.raises(FileExistsError):
        spec.put_file(str(tmp_path / "in"), "/f", mode="create")
    with (tmp_path / "stream").open("wb") as stream:
        spec.get_file("/f", stream)
    assert (tmp_path / "stream").stat().st_size == 3_000_000


def test_other_machines_changes_are_seen_at_once(spec: IvshmemFileSystem, other: Any) -> None:
    assert spec.ls("/") == []
    other.write_bytes("/new", b"")
    assert spec.ls("/", detail=False) == ["/new"]


def test_transactions_are_refused(spec: IvshmemFileSystem) -> None:
    with pytest.raises(NotImplementedError, match="rename"), spec.transaction:
        spec.open("/f", "wb")


def test_touch(spec: IvshmemFileSystem) -> None:
    spec.pipe_file("/f", b"12345")
    spec.client.utime("/f", ns=(0, 0))
    spec.touch("/f", truncate=False)
    assert spec.cat("/f") == b"12345"
    assert spec.modified("/f").year > 2000
    spec.touch("/f")
    assert spec.cat("/f") == b""
