"""What cannot be a region is refused in one line that says what to do, and left unchanged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest

from ivshmemfs.errors import (
    IvshmemfsError,
    RegionAmbiguous,
    RegionDenied,
    RegionError,
    RegionMissing,
    RegionSize,
    RegionUnfit,
    UsageError,
)
from ivshmemfs.region import Roots, create_file, open_region
from ivshmemfs.region import mapped as mapped_module
from tests.region.backends import SIZE, make_mem, make_pci, make_uio
from tests.support.sysfs import ONE, REGISTERS, START, FakeMachine


def refused(
    spec: str, kind: type[IvshmemfsError], *, roots: Roots | None = None, readonly: bool = False
) -> str:
    """Open, expect that error, and check that its message is one line fit for a user."""
    with pytest.raises(IvshmemfsError) as caught:
        open_region(spec, roots=roots or Roots(), readonly=readonly).close()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.isprintable()
    assert ";" in message  # what is wrong; what to do
    return message


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user without rights, and become root again."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
def roots_file() -> Iterator[Path]:
    """A region that only root may open, where all users may look."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a file that it then may not open")
    path = Path(f"/dev/shm/ivshmemfs-test-{os.getpid()}")
    create_file(path, SIZE)
    yield path
    path.unlink()


# --- files ----------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    assert "create it with: mkfs.ivshmemfs" in refused(f"{tmp_path}/none", RegionMissing)
    refused(f"{tmp_path}/none/deeper", RegionMissing)
    refused(f"{tmp_path}/none:1M", RegionMissing)
    refused(f"{tmp_path}/none:0x1000:1M", RegionMissing)
    refused("bad\0name", RegionMissing)


def test_a_missing_file_with_a_hostile_name_is_still_one_line(tmp_path: Path) -> None:
    message = refused(f"{tmp_path}/line\nbreak\x1b[31m", RegionMissing)
    assert "line\\nbreak\\x1b" in message


def test_an_empty_name() -> None:
    refused("", UsageError)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert "is it the right one" in refused(str(path), RegionSize)
    assert path.stat().st_size == 0


def test_a_tiny_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(b"x" * 4095)
    assert "4095 bytes are too small" in refused(str(path), RegionSize)
    assert path.read_bytes() == b"x" * 4095


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is a directory" in refused(str(tmp_path), RegionError)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refused(str(tmp_path / "pipe"), RegionError)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "is a socket" in refused(str(tmp_path / "socket"), RegionError)


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RegionError, match=r"cannot be opened \(Too many"):
        open_region(str(tmp_path / "loop"))


def raise_os(code: int) -> int:
    raise OSError(code, os.strerror(code))


def test_a_file_of_another_user(roots_file: Path) -> None:
    with as_nobody():
        assert "run as root" in refused(str(roots_file), RegionDenied)
        refused(str(roots_file), RegionDenied, readonly=True)


def test_a_readonly_file_opens_readonly_only(roots_file: Path) -> None:
    roots_file.chmod(0o444)
    with as_nobody():
        message = refused(str(roots_file), RegionDenied)
        assert "mount it with -o ro" in message
        assert "run as root" in message
        with open_region(str(roots_file), readonly=True) as region:
            assert region.readonly


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, 16])
def test_a_sealed_memfd(seal: int) -> None:
    descriptor = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, SIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        message = refused(path, RegionDenied)
        assert "WRITE" in message
        assert "-o ro" in message
        with open_region(path, readonly=True) as region:
            assert region.size == SIZE
    finally:
        os.close(descriptor)


def test_a_file_that_even_root_must_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As chattr +i has it; not every filesystem here has the attribute."""
    create_file(tmp_path / "region", SIZE)
    real = os.open

    def immutable(path: Path, flags: int, *words: int) -> int:
        return raise_os(errno.EPERM) if flags & os.O_RDWR else real(path, flags, *words)

    monkeypatch.setattr(os, "open", immutable)
    message = refused(str(tmp_path / "region"), RegionDenied)
    assert "lsattr" in message
    assert "-o ro" in message


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, RegionMissing),
        (errno.ENODEV, RegionMissing),
        (errno.EPERM, RegionDenied),
        (errno.EROFS, RegionDenied),
        (errno.EBUSY, RegionError),
        (errno.EISDIR, RegionError),
        (errno.EIO, RegionError),
    ],
)
def test_any_refusal_of_the_kernel_is_explained(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[RegionError]
) -> None:
    monkeypatch.setattr(os, "open", lambda *_a, **_k: raise_os(code))
    refused("/dev/zero:1M", kind)


def test_a_size_for_a_file(tmp_path: Path) -> None:
    create_file(tmp_path / "region", SIZE)
    with pytest.raises(UsageError, match="only a character device"):
        open_region(f"{tmp_path}/region:1M")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENODEV, RegionUnfit),
        (errno.ENOMEM, RegionError),
        (errno.EINVAL, RegionSize),
        (errno.EACCES, RegionDenied),
        (errno.EPERM, RegionDenied),
    ],
)
def test_a_file_that_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[RegionError]
) -> None:
    create_file(tmp_path / "region", SIZE)
    monkeypatch.setattr(mapped_module, "Memory", lambda *_a, **_k: raise_os(code))
    refused(str(tmp_path / "region"), kind)


# --- creating -------------------------------------------------------------------------------


def created(path: Path, size: int, kind: type[RegionError], *, exist_ok: bool = False) -> str:
    with pytest.raises(RegionError) as caught:
        create_file(path, size, exist_ok=exist_ok)
    assert type(caught.value) is kind
    assert str(caught.value).isprintable()
    assert ";" in str(caught.value)
    return str(caught.value)


def test_create_refuses_what_exists_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"precious")
    created(path, SIZE, RegionError)
    assert path.read_bytes() == b"precious"
    create_file(path, SIZE, exist_ok=True)
    assert path.stat().st_size == SIZE
    assert path.read_bytes()[:9] == b"precious\0"


def test_create_makes_a_sparse_private_file(tmp_path: Path) -> None:
    create_file(tmp_path / "region", 1 << 30)
    status = (tmp_path / "region").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks == 0
    assert status.st_mode & 0o007 == 0


def test_create_where_it_cannot(tmp_path: Path) -> None:
    assert "no such directory" in created(tmp_path / "no/region", SIZE, RegionMissing)
    assert "smaller size" in created(tmp_path / "huge", 1 << 62, RegionSize)
    assert not (tmp_path / "huge").exists()
    (tmp_path / "directory").mkdir()
    created(tmp_path / "directory", SIZE, RegionError, exist_ok=True)
    os.mkfifo(tmp_path / "pipe")
    created(tmp_path / "pipe", SIZE, RegionError, exist_ok=True)


# --- PCI ------------------------------------------------------------------------------------


def test_no_pci_device(tmp_path: Path) -> None:
    roots = FakeMachine(tmp_path).roots
    assert "(PCI 1af4:1110) here" in refused("pci", RegionMissing, roots=roots)
    assert "no PCI device" in refused("pci:0000:00:04.0", RegionMissing, roots=roots)
    bare = Roots(sys=tmp_path / "nothing")
    for spec in ("pci", "pci:0000:00:04.0"):
        assert "sysfs is not mounted" in refused(spec, RegionMissing, roots=bare)


@pytest.mark.parametrize("text", ["", "4", "0000:00:04", "00:04.9", "../../x", "0000:00:04.0 "])
def test_what_is_no_pci_address(text: str) -> None:
    refused(f"pci:{text}", UsageError)


def test_another_kind_of_pci_device(tmp_path: Path) -> None:
    backend = make_pci(tmp_path, combining=True, machine="x86_64")
    backend.file.with_name("device").write_text("0x1000\n")
    assert "is not an ivshmem" in refused(backend.spec, RegionError, roots=backend.roots)
    refused("pci", RegionMissing, roots=backend.roots)


@pytest.mark.parametrize("resource", ["", "garbage", "0x0 0x0 0x0\n" * 3])
def test_a_device_without_shared_memory(tmp_path: Path, resource: str) -> None:
    backend = make_pci(tmp_path, combining=True, machine="x86_64")
    backend.file.with_name("resource").write_text(resource)
    assert "BAR2" in refused(backend.spec, RegionSize, roots=backend.roots)
    assert backend.file.with_name("enable").read_text() == "0\n"


def test_a_device_that_is_smaller_than_it_says(tmp_path: Path) -> None:
    backend = make_pci(tmp_path, combining=False, machine="x86_64")
    os.truncate(backend.file, 4096)
    assert "4096" in refused(backend.spec, RegionSize, roots=backend.roots)


def test_a_device_that_cannot_be_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_pci(tmp_path, combining=True, machine="x86_64")

    def refuse(*_args: object, **_named: object) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "run as root" in refused(backend.spec, RegionDenied, roots=backend.roots)


def two_devices(tmp_path: Path) -> Roots:
    first = make_pci(tmp_path, combining=True, machine="x86_64")
    make_pci(tmp_path, combining=True, machine="x86_64", address="0000:00:05.0")
    return first.roots


def test_several_devices(tmp_path: Path) -> None:
    roots = two_devices(tmp_path)
    message = refused("pci", RegionAmbiguous, roots=roots)
    assert "pci:0000:00:04.0" in message
    assert "pci:0000:00:05.0" in message


# --- choosing by its contents ---------------------------------------------------------------


def identify(page: bytes) -> tuple[str, str] | None:
    """Pretends that a filesystem starts with MAGIC and its label."""
    assert len(page) == 4096
    if not page.startswith(b"MAGIC "):
        return None
    label = page[6:].split(b"\0")[0].decode()
    return label, f"uuid-of-{label}"


def stamp(spec: str, label: str, roots: Roots) -> None:
    with open_region(spec, roots=roots) as region:
        region.memory.write(0, b"MAGIC " + label.encode())


def test_of_several_devices_the_formatted_one_is_chosen(tmp_path: Path) -> None:
    roots = two_devices(tmp_path)
    with pytest.raises(RegionAmbiguous, match="none formatted"):
        open_region("pci", identify=identify, roots=roots)
    stamp("pci:0000:00:05.0", "one", roots)
    with open_region("pci", identify=identify, roots=roots) as region:
        assert region.spec == "pci:0000:00:05.0"
    stamp("pci:0000:00:04.0", "two", roots)
    with pytest.raises(RegionAmbiguous, match="2 regions are a formatted ivshmem device"):
        open_region("pci", identify=identify, roots=roots)


def test_a_region_is_found_by_label_or_uuid(tmp_path: Path) -> None:
    roots = two_devices(tmp_path)
    roots.shm.mkdir(parents=True)
    create_file(roots.shm / "hello", SIZE)
    stamp("pci:0000:00:05.0", "one", roots)
    stamp(str(roots.shm / "hello"), "two", roots)
    for spec, expected in (
        ("label=one", "pci:0000:00:05.0"),
        ("label=two", str(roots.shm / "hello")),
        ("uuid=uuid-of-two", str(roots.shm / "hello")),
        ("uuid=UUID-OF-TWO", str(roots.shm / "hello")),
    ):
        with open_region(spec, identify=identify, roots=roots) as region:
            assert region.spec == expected
    for spec in ("label=TWO", "label=three", "uuid=two"):
        with pytest.raises(RegionMissing, match="no region is"):
            open_region(spec, identify=identify, roots=roots)
    for spec in ("label=", "uuid="):
        with pytest.raises(UsageError, match="lacks a value"):
            open_region(spec, identify=identify, roots=roots)
    refused("label=one", UsageError, roots=roots)  # no process to ask


def test_a_label_that_two_regions_carry_is_refused(tmp_path: Path) -> None:
    roots = two_devices(tmp_path)
    stamp("pci:0000:00:04.0", "same", roots)
    stamp("pci:0000:00:05.0", "same", roots)
    with pytest.raises(RegionAmbiguous, match="2 regions are label=same"):
        open_region("label=same", identify=identify, roots=roots)


def test_one_device_seen_in_two_ways_is_one_region(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    machine.bind(ONE, "uio_ivshmem")
    machine.uio("245:0", ONE, [(REGISTERS, 256), (START, SIZE)])
    stamp(f"pci:{ONE}", "twice", machine.roots)
    stamp(f"{machine.roots.dev}/uio0", "twice", machine.roots)
    with open_region("label=twice", identify=identify, roots=machine.roots) as region:
        assert region.spec == f"pci:{ONE}"


def test_unreadable_regions_are_mentioned(roots_file: Path) -> None:
    roots = Roots(sys=Path("/nowhere"))
    with as_nobody(), pytest.raises(RegionDenied, match=f"try as root.*{roots_file.name}"):
        open_region("label=surely-not-there", identify=lambda _: None, roots=roots)


# --- /dev/mem -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "0x1000", ":", "0x1000:", ":1M", "0x1001:1M", "zzz:1M", "0x1000:none", "-4096:1M",
             "0x1000:0", "0x7ffffffffffff000:1M", "0x:1M", "0x00000000000001000:1M"]
)  # fmt: skip
def test_what_is_no_physical_range(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_region(f"mem:{text}", roots=make_mem(tmp_path, "x86_64").roots)


def test_a_kernel_without_devmem(tmp_path: Path) -> None:
    message = refused("mem:0x20000:1M", RegionMissing, roots=Roots(dev=tmp_path, proc=tmp_path))
    assert "no /dev/mem" in message


def test_the_kernels_own_memory(tmp_path: Path) -> None:
    backend = make_mem(tmp_path, "x86_64")
    assert "uses itself" in refused("mem:0x0:1M", RegionError, roots=backend.roots)
    assert "uses itself" in refused("mem:0xf000:1M", RegionError, roots=backend.roots)
    open_region("mem:0x10000:1M", roots=backend.roots).close()


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.EPERM, RegionDenied, "strict devmem"),
        (errno.EINVAL, RegionSize, "no such physical range"),
    ],
)
def test_devmem_that_refuses_the_range(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[RegionError],
    words: str,
) -> None:
    backend = make_mem(tmp_path, "x86_64")
    monkeypatch.setattr("ivshmemfs.region.devmem.Memory", lambda *_a, **_k: raise_os(code))
    assert words in refused(backend.spec, kind, roots=backend.roots)


def test_a_tiny_physical_range(tmp_path: Path) -> None:
    refused("mem:0x20000:64", RegionSize, roots=make_mem(tmp_path, "x86_64").roots)


# --- character devices ----------------------------------------------------------------------


def test_a_device_that_does_not_tell_its_size() -> None:
    assert "/dev/zero:SIZE" in refused("/dev/zero", RegionSize)


def test_a_device_that_cannot_be_mapped() -> None:
    assert "cannot be mapped" in refused("/dev/null:1M", RegionUnfit)


def test_more_than_a_device_has(tmp_path: Path) -> None:
    backend = make_uio(tmp_path)
    assert "has only 2M" in refused(f"{backend.spec}:3M", RegionSize, roots=backend.roots)


def test_an_odd_offset(tmp_path: Path) -> None:
    backend = make_uio(tmp_path)
    message = refused(f"{backend.spec}:100:1M", RegionSize, roots=backend.roots)
    assert "check offset and size" in message


@pytest.mark.parametrize("suffix", [":x", ":1Q", ":0", ":-5", ":z:1M"])
def test_a_size_that_is_none(suffix: str) -> None:
    refused(f"/dev/zero{suffix}", UsageError)


REFUSING: list[Callable[[Path], str]] = [
    lambda p: str(p / "none"),
    lambda p: str(p),
    lambda p: "/dev/zero",
    lambda p: "/dev/null:1M",
    lambda p: "/dev/zero:100:1M",
]


@pytest.mark.parametrize("index", range(len(REFUSING)))
def test_a_refusal_leaves_no_descriptor(tmp_path: Path, index: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IvshmemfsError):
        open_region(REFUSING[index](tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_region_opens_where_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look that may hang is left to a thread; a limit on processes must not refuse it."""

    def limited(_thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    create_file(tmp_path / "region", SIZE)
    monkeypatch.setattr(Thread, "start", limited)
    open_region(str(tmp_path / "region")).close()
