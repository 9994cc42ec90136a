"""One contract that every way of opening a region passes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.region import (
    DEVICE,
    NORMAL,
    Roots,
    create_file,
    discover,
    open_region,
    probe,
)
from tests.region.backends import (
    PAGE,
    SIZE,
    Backend,
    by_resource,
    make_file,
    make_mem,
    make_pci,
    make_uio,
)
from tests.support.sysfs import FakeMachine, FakeRoots


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A mounted hugetlbfs with two huge pages."""
    pages = Path("/proc/sys/vm/nr_hugepages")
    mountpoint = tmp_path / "huge"
    mountpoint.mkdir()
    try:
        before = pages.read_text()
        pages.write_text(str(int(before) + 2))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error}")
    try:
        done = subprocess.run(
            ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", mountpoint],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"hugetlbfs cannot be mounted: {done.stderr.strip()}")
        yield mountpoint
        subprocess.run(["umount", mountpoint], check=True)
    finally:
        pages.write_text(before)


BACKENDS = [
    "tmpfs", "file", "hugetlbfs", "pci-wc", "pci-plain", "pci-arm", "pci-arm-wc", "resource2",
    "resource2_wc", "mem", "mem-arm", "uio", "chardev-size", "chardev-offset",
]  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    match request.param:
        case "tmpfs":
            path = Path(f"/dev/shm/ivshmemfs-test-{os.getpid()}")
            create_file(path, SIZE)
            yield Backend(str(path), Roots(), path, 0, NORMAL)
            path.unlink()
        case "file":
            yield make_file(tmp_path)
        case "hugetlbfs":
            yield make_file(request.getfixturevalue("hugetlbfs"))
        case "pci-wc" | "pci-plain":
            yield make_pci(tmp_path, combining=request.param == "pci-wc", machine="x86_64")
        case "pci-arm" | "pci-arm-wc":
            yield make_pci(tmp_path, combining=request.param == "pci-arm-wc", machine="aarch64")
        case "resource2" | "resource2_wc":
            yield by_resource(make_pci(tmp_path, combining=True, machine="aarch64"), request.param)
        case "mem" | "mem-arm":
            machine = "x86_64" if request.param == "mem" else "aarch64"
            yield make_mem(tmp_path, machine)
        case "uio":
            yield make_uio(tmp_path)
        case "chardev-size":
            made = make_uio(tmp_path)
            made.spec += ":2M"
            yield made
        case "chardev-offset":
            made = make_uio(tmp_path)
            made.spec += f":{PAGE:#x}:2M"
            yield made


def behind(backend: Backend, offset: int, length: int) -> bytes:
    """What the file behind the region holds, past the mapping where read(2) works."""
    with backend.open(readonly=True) as other:
        return other.memory.read(offset, length)


class TestContract:
    def test_it_has_its_whole_size_and_its_access(self, backend: Backend) -> None:
        with backend.open() as region:
            assert region.size == SIZE
            assert region.memory.length == SIZE
            assert region.memory.access == backend.access
            assert not region.readonly
            assert region.path.exists()

    def test_its_description_is_one_short_line(self, backend: Backend) -> None:
        with backend.open() as region:
            assert "2 MiB" in region.description
            assert region.description.isprintable()
            assert len(region.description) < 80
            assert "read-only" not in region.description
        with backend.open(readonly=True) as region:
            assert region.description.endswith("read-only")

    def test_its_spec_opens_it_again(self, backend: Backend) -> None:
        with (
            backend.open() as one,
            open_region(one.spec, roots=backend.roots) as two,
        ):
            assert two.spec == one.spec
            one.memory.store(8, 4711)
            assert two.memory.load(8) == 4711

    def test_every_byte_can_be_stored_and_read(self, backend: Backend) -> None:
        data = bytes(range(256)) * (SIZE // 256)
        with backend.open() as region:
            region.memory.write(0, data)
            assert region.memory.read(0, SIZE) == data
            region.memory.zero(1, SIZE - 2)
            assert region.memory.is_zero(1, SIZE - 2)
            assert region.memory.read(SIZE - 1, 1) == data[-1:]

    def test_two_openings_see_each_others_stores(self, backend: Backend) -> None:
        with backend.open() as one, backend.open(readonly=True) as two:
            assert one.memory.cas(64, 0, 5) == 0
            assert two.memory.load(64) == 5
            one.memory.write(SIZE - 5, b"hello")
            assert two.memory.read(SIZE - 5, 5) == b"hello"

    def test_stores_reach_what_is_behind_it(self, backend: Backend) -> None:
        with backend.open() as region:
            region.memory.write(123, b"through")
        assert behind(backend, 123, 7) == b"through"
        with backend.file.open("rb") as file:
            file.seek(backend.start + 123)
            assert file.read(7) == b"through"

    def test_readonly_stores_nothing(self, backend: Backend) -> None:
        with backend.open(readonly=True) as region:
            assert region.readonly
            with pytest.raises(OSError, match="read-only") as caught:
                region.memory.store(0, 1)
            assert caught.value.errno == errno.EROFS
            assert region.memory.is_zero(0, SIZE)

    def test_closing_ends_it(self, backend: Backend) -> None:
        region = backend.open()
        region.close()
        region.close()
        with pytest.raises(ValueError, match="closed"):
            region.memory.load(0)

    def test_one_descriptor_stays_open_to_compare_with(self, backend: Backend) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with backend.open() as one, backend.open(readonly=True) as two:
            anchors = (one.anchor is not None) + (two.anchor is not None)
            more = len(os.listdir("/proc/self/fd")) - before - anchors
            # The kernel may write to a file of tmpfs in place of its mapping.
            if backend.file.is_relative_to("/dev/shm"):
                assert more == 1
            else:
                assert more in (0, 1), "the temporary directory may be on tmpfs"
        assert len(os.listdir("/proc/self/fd")) == before

    def test_what_vanishes_is_an_error(self, backend: Backend) -> None:
        with backend.open() as region:
            assert region.memory.load(8) == 0
            os.truncate(backend.file, 0)
            with pytest.raises(OSError, match="bus error"):
                region.memory.load(8)

    def test_the_probe_stores_nothing(self, backend: Backend) -> None:
        with backend.open() as region:
            region.memory.write(0, b"\x5a" * 8192)
            found = probe(region.memory)
            assert region.memory.stores == 4
            assert found.unaligned_ok
            assert found.cas_ok is None
            assert found.read_mbps > 1


def test_the_device_is_enabled_when_it_was_off(tmp_path: Path) -> None:
    backend = make_pci(tmp_path, combining=True, machine="x86_64")
    switch = backend.file.with_name("enable")
    backend.open().close()
    assert switch.read_text() == "1"
    switch.write_text("3\n")
    backend.open().close()
    assert switch.read_text() == "3\n"  # switched on already: counts of others stay


@pytest.mark.parametrize("spec", ["pci", "pci:00:04.0", "pci:0000:00:04.0"])
def test_a_pci_device_has_several_names_and_one_spec(tmp_path: Path, spec: str) -> None:
    backend = make_pci(tmp_path, combining=True, machine="aarch64")
    with open_region(spec, roots=backend.roots) as region:
        assert region.spec == "pci:0000:00:04.0"
        assert region.path.name == "resource2_wc"


def test_an_unusable_resource2_wc_falls_back(tmp_path: Path) -> None:
    backend = make_pci(tmp_path, combining=False, machine="aarch64")
    backend.file.with_name("resource2_wc").write_bytes(b"")
    with backend.open() as region:
        assert region.path.name == "resource2"
        assert region.memory.access == DEVICE


@pytest.mark.parametrize("name", ["resource2", "resource2_wc"])
def test_the_file_that_is_named_is_the_one_that_is_mapped(tmp_path: Path, name: str) -> None:
    backend = by_resource(make_pci(tmp_path, combining=True, machine="aarch64"), name)
    with backend.open() as region:
        assert region.path == backend.file.with_name(name)
    assert backend.file.with_name("enable").read_text() == "1"


def test_a_file_called_like_a_resource_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "resource2"
    create_file(path, SIZE)
    with open_region(str(path)) as region:
        assert region.memory.access == NORMAL


@pytest.mark.parametrize("spec", ["mem:0x20000:2M", "mem:0X20000:0x200000", "mem:0x00020000:2048K"])
def test_a_physical_range_has_one_spec(tmp_path: Path, spec: str) -> None:
    backend = make_mem(tmp_path, "x86_64")
    with open_region(spec, roots=backend.roots) as region:
        assert region.spec == "mem:0x20000:2M"


def test_a_file_region_grows_no_further_than_its_end(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(5000))
    with open_region(str(path)) as region:
        assert region.size == 5000
        with pytest.raises(ValueError, match="outside"):
            region.memory.read(4999, 2)


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    with open_region("region") as region:
        assert region.spec == str(backend.file)


def test_a_file_whose_name_looks_like_something_else_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("with:colon", "region:1M", "label=x", "ünï"):
        create_file(name, SIZE)
        with open_region(name) as region:
            assert region.path.name == name


def test_a_real_character_device_is_mapped() -> None:
    with open_region("/dev/zero:1M") as region:  # each mapping of it is memory of its own
        assert region.spec == "/dev/zero:1M"
        assert region.size == 1 << 20
        region.memory.store(8, 5)
        assert region.memory.load(8) == 5


def test_device_dax_counts_as_cached(tmp_path: Path) -> None:
    backend = make_uio(tmp_path)
    dax = backend.file.with_name("dax0.0")
    create_file(dax, SIZE)
    assert isinstance(backend.roots, FakeRoots)
    backend.roots.numbers[dax] = "0:1"
    described = backend.roots.sys / "dev/char/0:1"
    described.mkdir()
    (described / "size").write_text(f"{SIZE}\n")
    with open_region(str(dax), roots=backend.roots) as region:
        assert region.memory.access == NORMAL
        assert region.size == SIZE


def test_a_device_that_only_answers_itself_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_uio(tmp_path)
    other = backend.file.with_name("kvmfr0")
    create_file(other, SIZE)
    empty = FakeRoots(sys=tmp_path / "none", dev=backend.roots.dev, numbers={other: "0:1"})
    asked: list[int] = []

    def ioctl(_descriptor: int, request: int) -> int:
        asked.append(request)
        return SIZE

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with open_region(str(other), roots=empty) as region:
        assert region.size == SIZE
    assert asked == [0x7544]


def test_discovery_lists_what_could_be_a_region(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    machine.device("0000:00:06.0", kind=0x1000)
    machine.roots.shm.mkdir()
    create_file(machine.roots.shm / "hello", SIZE)
    (machine.roots.shm / "tiny").write_bytes(b"x")
    (machine.roots.shm / "link").symlink_to("hello")
    machine.in_dev("kvmfr0", "240:0")
    machine.in_dev("uio0", "241:0")  # may be anything: it is not even opened
    (machine.roots.dev / "ivshmem.log").touch()
    found = [(c.spec, c.description, c.size) for c in discover(machine.roots)]
    dev = machine.roots.dev
    assert found == [
        ("pci:0000:00:04.0", "PCI device, 2 MiB", SIZE),
        (f"{dev}/kvmfr0", "device, size unknown", 0),
        (f"{dev}/shm/hello", "file, 2 MiB", SIZE),
    ]
    assert discover(Roots(sys=tmp_path / "none", dev=tmp_path / "none")) == []
