"""`ivshmemfs mount` and `umount` on real regions: what works, and one line for what does not."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ivshmemfs import __version__
from ivshmemfs.format import superblock
from ivshmemfs.region import open_region
from tests.cli.conftest import complains, impatient, ivshmemfs
from tests.support.mounts import PATIENCE, eventually, mount_lines, needs_fuse, run, stop
from tests.support.regions import TestRegion, new_region

pytestmark = needs_fuse


def mounted(*words: object) -> None:
    """Mount, and insist that it works."""
    result = ivshmemfs("mount", *words)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def unmounted(path: Path) -> None:
    """Unmount, and insist that it works."""
    result = ivshmemfs("umount", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not mount_lines(path)


# --- what works -------------------------------------------------------------------------------


def test_two_mounts_exchange_files(formatted: TestRegion, places: list[Path]) -> None:
    one, two, _ = places
    mounted(formatted.path, one)
    mounted(formatted.path, two)
    data = os.urandom(300_000)
    (one / "from one").write_bytes(data)
    assert (two / "from one").read_bytes() == data
    (two / "from one").rename(two / "renamed")
    assert os.listdir(one) == ["renamed"]
    (one / "renamed").unlink()
    assert not (two / "renamed").exists()
    unmounted(one)
    unmounted(two)


def test_umount_leaves_the_peer_table(formatted: TestRegion, place: Path) -> None:
    mounted(formatted.path, place)
    assert "alive" in ivshmemfs("peers", formatted.path).stdout
    unmounted(place)
    assert "no machine" in ivshmemfs("peers", formatted.path).stdout


def test_what_was_written_is_there_later(formatted: TestRegion, place: Path) -> None:
    mounted(formatted.path, place)
    (place / "f").write_text("kept")
    unmounted(place)
    mounted(formatted.path, place)
    assert (place / "f").read_text() == "kept"
    unmounted(place)


def test_read_only(formatted: TestRegion, places: list[Path]) -> None:
    mounted(formatted.path, places[0])
    (places[0] / "f").write_text("x")
    unmounted(places[0])
    before = formatted.path.read_bytes()
    formatted.path.chmod(0o400)
    mounted("-o", "ro", formatted.path, places[1])
    assert (places[1] / "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (places[1] / "g").touch()
    unmounted(places[1])
    assert formatted.path.read_bytes() == before


def test_a_relative_region(formatted: TestRegion, place: Path) -> None:
    result = run(
        *(sys.executable, "-m", "ivshmemfs.cli", "mount", formatted.path.name, place),
        cwd=formatted.path.parent,
    )
    assert result.returncode == 0, result.stderr
    assert os.listdir(place) == []
    unmounted(place)


def test_a_label(place: Path) -> None:
    path = Path(f"/dev/shm/ivshmemfs-label-test-{os.getpid()}")
    label = f"label test {os.getpid()}"
    try:
        made = run(sys.executable, "-m", "mkfs", "--size", "1M", "--label", label, path, timeout=60)
        assert made.returncode == 0, made.stderr
        mounted(f"label={label}", place)
        assert mount_lines(place)[0].split()[-2] == str(path)
        unmounted(place)
    finally:
        path.unlink(missing_ok=True)


def test_a_uuid(place: Path) -> None:
    path = Path(f"/dev/shm/ivshmemfs-uuid-test-{os.getpid()}")
    wanted = str(uuid.uuid4())
    try:
        made = run(sys.executable, "-m", "mkfs", "--size", "1M", "--uuid", wanted, path, timeout=60)
        assert made.returncode == 0, made.stderr
        mounted(f"uuid={wanted.upper()}", place)
        assert mount_lines(place)[0].split()[-2] == str(path)
        unmounted(place)
    finally:
        path.unlink(missing_ok=True)


def test_sixteen_gigabytes_with_a_name_of_255_bytes(place: Path) -> None:
    path = Path(f"/dev/shm/ivshmemfs-large-test-{os.getpid()}")
    name = os.fsencode(place) + b"/" + bytes(range(0x80, 0x100)) + b"n" * 127
    try:
        made = run(sys.executable, "-m", "mkfs", "--sparse", "--size", "16G", path, timeout=60)
        assert made.returncode == 0, made.stderr
        mounted(path, place)
        with open(name, "wb") as file:
            file.write(b"first")
            file.seek(1 << 33)
            file.write(b"last")
        assert os.listdir(os.fsencode(place)) == [os.path.basename(name)]
        assert os.stat(name).st_size == (1 << 33) + 4
        assert os.statvfs(place).f_blocks * os.statvfs(place).f_frsize > 15 << 30
        unmounted(place)
        assert path.stat().st_blocks * 512 < 256 << 20, "the file must stay sparse"
        checked = run(sys.executable, "-m", "ivshmemfs.fsck", "-n", path, timeout=120)
        assert (checked.returncode, checked.stderr) == (0, "")
    finally:
        path.unlink(missing_ok=True)


def test_as_a_mount_helper(formatted: TestRegion, place: Path) -> None:
    """As mount.fuse calls it for fuse.ivshmemfs; it adds suid and dev by itself."""
    result = ivshmemfs(formatted.path, place, "-o", "rw,dev,suid,noatime")
    assert (result.returncode, result.stderr) == (0, "")
    words = set(mount_lines(place)[0].split()[5].split(","))
    assert {"nosuid", "nodev", "noatime"} <= words
    unmounted(place)


def test_under_the_name_of_a_mount_helper(
    formatted: TestRegion, place: Path, tmp_path: Path
) -> None:
    helper = tmp_path / "mount.ivshmemfs"
    helper.write_text(
        f"#!{sys.executable}\nimport sys\nfrom ivshmemfs.cli.main import main\nmain()\n"
    )
    helper.chmod(0o755)
    result = run(helper, formatted.path, place, "-s", "-o", "rw,noauto,x-test")
    assert (result.returncode, result.stderr) == (0, "")
    unmounted(place)
    complains(run(helper, formatted.path), 1, "region and a mount point")
    for word in ("-V", "--version"):
        assert __version__ in run(helper, word).stdout


def test_foreground(formatted: TestRegion, place: Path) -> None:
    import subprocess

    words = [sys.executable, "-m", "ivshmemfs.cli", "mount", "-f", formatted.path, place]
    command = [str(word) for word in words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert eventually(lambda: mount_lines(place))
            assert os.listdir(place) == []
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert "no machine" in ivshmemfs("peers", formatted.path).stdout


def test_a_killed_daemon_is_cleared_and_its_slot_reused(place: Path) -> None:
    with new_region(1 << 20, peer_count=1) as region:
        mounted(region.path, place)
        (place / "f").write_text("kept")
        pid = pid_of_the_daemon(region.path)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not Path(f"/proc/{pid}").exists())
        assert "gone" in impatient("SILENCE=0.3", "peers", region.path).stdout
        unmounted(place)
        assert impatient("SILENCE=0.3", "mount", region.path, place).returncode == 0
        assert (place / "f").read_text() == "kept"
        unmounted(place)


def test_the_command_loads_nothing_that_only_the_daemon_needs(
    formatted: TestRegion, place: Path
) -> None:
    """trio and pyfuse3 take longer to load than all the rest of mounting."""
    code = "import sys; from ivshmemfs.cli.main import main; main()"
    result = run(sys.executable, "-X", "importtime", "-c", code, "mount", formatted.path, place)
    assert result.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "ivshmemfs.fuse.daemon" in loaded
    assert not loaded & {"trio", "pyfuse3", "ivshmemfs.fuse.session"}
    unmounted(place)


def pid_of_the_daemon(region: Path) -> int:
    return int(ivshmemfs("peers", region).stdout.splitlines()[1].split()[2])


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_every_command_ends_while_the_daemon_is_stopped(
    formatted: TestRegion, places: list[Path], tmp_path: Path, lazy: bool
) -> None:
    place, other, _ = places
    (tmp_path / "link").symlink_to(place)
    mounted(formatted.path, place)
    pid = pid_of_the_daemon(formatted.path)
    stop(pid)
    try:
        for target in (place, tmp_path / "link"):
            complains(ivshmemfs("mount", formatted.path, target), 32, "is busy")
            complains(ivshmemfs(formatted.path, target, "-o", "rw"), 32, "is busy")
        complains(ivshmemfs("mount", formatted.path, place / "below"), 32, f"kill -CONT {pid}")
        complains(ivshmemfs("mount", "-o", "remount,ro", place), 32, "is stopped")
        complains(ivshmemfs("lock", place / "f", "--", "true"), 32, "is stopped")
        for command in ("info", "dump"):
            assert ivshmemfs(command, place).returncode == 0
        assert ivshmemfs("get", "-r", place, "/", tmp_path / "got").returncode == 0
        assert ivshmemfs("list").returncode == 0
        mounted(formatted.path, other)
        unmounted(other)
        result = ivshmemfs("umount", *["--lazy"] * lazy, tmp_path / "link")
        if lazy:
            assert (result.returncode, result.stderr) == (0, "")
        else:
            complains(result, 32, "is unmounted", f"kill -CONT {pid}")
        assert not mount_lines(place)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_no_region_or_file_is_looked_at_on_a_mount_that_hangs(
    formatted: TestRegion, place: Path
) -> None:
    mounted(formatted.path, place)
    pid = pid_of_the_daemon(formatted.path)
    commands = (
        ("ivshmemfs.fsck", "-n", place),
        ("mkfs", "--size", "1M", place / "new"),
        ("ivshmemfs.cli", "info", place / "region"),
        ("ivshmemfs.cli", "get", formatted.path, "/x", place / "x"),
        ("ivshmemfs.cli", "put", formatted.path, place / "x", "/x"),
    )
    stop(pid)
    try:
        with ThreadPoolExecutor() as pool:
            for result in pool.map(
                lambda words: run(sys.executable, "-m", *words, timeout=60), commands
            ):
                assert result.returncode not in (0, 124)
                assert "does not answer within" in result.stderr
                assert result.stderr.count("\n") == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    unmounted(place)


def test_listing_looks_at_no_mount_among_the_regions(
    formatted: TestRegion, place: Path, tmp_path: Path
) -> None:
    mounted(formatted.path, place)
    pid = pid_of_the_daemon(formatted.path)
    code = (
        "import pathlib, sys; from ivshmemfs.region import Roots, discover; "
        "print(discover(Roots(dev=pathlib.Path(sys.argv[1]))))"
    )
    (tmp_path / "shm").symlink_to(place.parent)
    stop(pid)
    try:
        assert run(sys.executable, "-c", code, tmp_path).returncode == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    unmounted(place)


def test_the_column_of_options_can_be_given_back(formatted: TestRegion, place: Path) -> None:
    mounted("-o", "allow_other,noexec", formatted.path, place)
    lines = Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    shown = next(line.split()[3] for line in lines if line.split()[1] == str(place))
    unmounted(place)
    mounted("-o", shown, formatted.path, place)
    assert shown in Path("/proc/mounts").read_text(errors="surrogateescape")
    unmounted(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="remounting is for root")
def test_remounting(formatted: TestRegion, places: list[Path]) -> None:
    place, reader, _ = places
    mounted(formatted.path, place)
    mounted("-o", "remount,ro", place)
    with pytest.raises(OSError, match="Read-only"):
        (place / "f").touch()
    mounted("-o", "remount,rw,noexec", formatted.path, place)
    (place / "f").touch()
    assert {"rw", "noexec", "nosuid", "nodev"} <= set(mount_lines(place)[0].split()[5].split(","))
    unmounted(place)
    mounted("-o", "ro", formatted.path, reader)
    complains(ivshmemfs("mount", "-o", "remount,rw", reader), 32, "was mounted read-only")
    assert mount_lines(reader)[0].split()[5].startswith("ro")
    unmounted(reader)
    complains(ivshmemfs("mount", "-o", "remount,rw", reader), 32, "is not mounted")


def test_a_region_or_its_mount_point(formatted: TestRegion, places: list[Path]) -> None:
    for path in places[:2]:
        mounted(formatted.path, path)
    for command in ("info", "peers", "dump"):
        assert ivshmemfs(command, places[0]).returncode == 0
    assert ivshmemfs("put", places[0], __file__, "/copy").returncode == 0
    assert ivshmemfs("get", places[0], "/copy", "-").stdout == Path(__file__).read_text()
    complains(ivshmemfs("umount", formatted.path), 1, "2 times", str(places[0]), str(places[1]))
    unmounted(places[1])
    result = ivshmemfs("umount", formatted.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert not mount_lines(places[0])
    complains(ivshmemfs("umount", formatted.path), 32, "is not mounted")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_user_unmounts_what_shows_root_as_its_owner(formatted: TestRegion) -> None:
    """The kernel lets this user not even look at the mount point."""
    script = """
mount -t tmpfs tmpfs /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse
mkdir /mnt/place && chown nobody /mnt/place "$1"
as_user() { setpriv --reuid 65534 --regid 65534 --clear-groups "$PYTHON" -m ivshmemfs "$@"; }
as_user mount -o uid=0,umask=077 "$1" /mnt/place && as_user umount /mnt/place
"""
    formatted.path.parent.chmod(0o755)
    words = ["unshare", "--mount", "sh", "-c", script, "sh", formatted.path]
    result = run(*words, env={"PYTHON": sys.executable})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- what does not ----------------------------------------------------------------------------


def refused(region: object, place: Path, code: int, *words: str, options: str = "rw") -> None:
    """Check that mounting fails with one line, and that nothing was mounted or changed."""
    path = Path(str(region))
    before = path.read_bytes() if path.is_file() else None
    complains(ivshmemfs("mount", "-o", options, region, place), code, *words)
    assert not mount_lines(place)
    if before is not None:
        assert path.read_bytes() == before


def test_not_formatted(tmp_path: Path, place: Path) -> None:
    region = tmp_path / "zeros"
    region.write_bytes(bytes(1 << 20))
    refused(region, place, 32, "no filesystem", "mkfs.ivshmemfs")


def test_foreign(tmp_path: Path, place: Path) -> None:
    region = tmp_path / "other"
    region.write_bytes(b"something else " * 70_000)
    refused(region, place, 32, "something else", "is it the right file or device")


def test_a_newer_version(formatted: TestRegion, place: Path) -> None:
    with open_region(str(formatted.path)) as region:
        record = superblock.SUPERBLOCK.unpack(region.memory.read(0, 512))
        region.memory.write(0, superblock.seal(record._replace(major=superblock.MAJOR + 1)))
    refused(formatted.path, place, 32, "format 2.0", "knows 1.0", "version")


def test_an_unknown_feature(formatted: TestRegion, place: Path) -> None:
    with open_region(str(formatted.path)) as region:
        record = superblock.SUPERBLOCK.unpack(region.memory.read(0, 512))
        region.memory.write(0, superblock.seal(record._replace(incompat=1 << 40)))
    refused(formatted.path, place, 32, "features", "newer version")


@pytest.mark.parametrize(("size", "word"), [(1 << 19, "smaller"), (1 << 21, "larger")])
def test_another_size(formatted: TestRegion, place: Path, size: int, word: str) -> None:
    os.truncate(formatted.path, size)
    refused(formatted.path, place, 32, word, "old size")


def test_missing_regions(place: Path) -> None:
    refused("/dev/shm/there is no such thing", place, 32, "no such file", "mkfs.ivshmemfs")
    refused("pci:0000:99:99.0", place, 32, "0000:99:99.0")
    refused("label=nobody has this label", place, 32, "nobody has this label")
    refused("/dev/null", place, 32, "/dev/null")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_unreadable_region(formatted: TestRegion, place: Path) -> None:
    formatted.path.chmod(0o600)
    formatted.path.parent.chmod(0o755)
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from ivshmemfs.cli.main import main\n"
        f"main(['info', {str(formatted.path)!r}])"
    )
    complains(run(sys.executable, "-c", code), 32, "permission denied", "run as root")


def test_no_device(place: Path) -> None:
    """Nothing here is an ivshmem device; and if there is one, it is the one that is mounted."""
    from ivshmemfs.region import discover

    if any(candidate.device for candidate in discover()):
        pytest.skip("this machine has an ivshmem device")
    complains(ivshmemfs("mount", place), 32, "no ivshmem device", "ivshmemfs list")


def test_mount_points(formatted: TestRegion, place: Path, tmp_path: Path) -> None:
    complains(ivshmemfs("mount", formatted.path, tmp_path / "x"), 32, "does not exist")
    mounted(formatted.path, place)
    complains(ivshmemfs("mount", formatted.path, place), 32, "is busy", f"{formatted.path}")
    assert len(mount_lines(place)) == 1
    unmounted(place)
    complains(ivshmemfs("umount", place), 32, "is not mounted")
    complains(ivshmemfs("umount", "/proc"), 32, "not an ivshmemfs mount")


def test_umount_of_a_busy_mount(formatted: TestRegion, place: Path) -> None:
    mounted(formatted.path, place)
    with open(place / "f", "w"):
        complains(ivshmemfs("umount", place), 32, "is in use", "--lazy")
        assert mount_lines(place)
    unmounted(place)


def test_a_full_region(formatted: TestRegion, place: Path) -> None:
    mounted(formatted.path, place)

    def fill() -> None:
        for number in range(100):
            (place / f"f{number}").write_bytes(bytes(50_000))

    with pytest.raises(OSError, match=r".") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    for path in place.iterdir():
        path.unlink()
    (place / "again").write_bytes(bytes(800_000))
    unmounted(place)


@pytest.mark.slow
def test_too_many_peers(places: list[Path]) -> None:
    with new_region(1 << 20, peer_count=1) as region:
        mounted(region.path, places[0])
        complains(ivshmemfs("mount", region.path, places[1]), 32, "all 1 peer slots", "evict")
        mounted("-o", "ro", region.path, places[1])
        unmounted(places[0])
        mounted(region.path, places[2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mount"], "mount point"),
        (["mount", "-o", "bogus", "/dev/shm/x", "/tmp"], "bogus"),
        (["mount", "-o", "uid=nobody at all", "/dev/shm/x", "/tmp"], "nobody at all"),
        (["mount", "--bogus"], "--bogus"),
        (["mount", "label=x"], "ivshmemfs mount label=x MOUNTPOINT"),
        (["mount", "UUID=x"], "name the mount point too"),
        (["mount", "pci"], "name the mount point too"),
        (["mount", "/etc/passwd"], "name the mount point too"),
        (["mount", ""], "no name"),
        (["mount", "/dev/shm/x", ""], "no name"),
        (["mount", "", "/tmp"], "no name"),
        (["umount", ""], "no name"),
        (["info", ""], "no name"),
        (["mount", "a", "b", "c"], "unexpected extra argument"),
        (["umount"], "Missing argument"),
        (["get", "/dev/shm/x", "/f"], "/f is one path, and two are needed, from and to"),
        (["put", "/dev/shm/x", "/f"], "ivshmemfs put REGION FILE... DESTINATION"),
        (["mv", "/dev/shm/x:/f"], "ivshmemfs mv SOURCE... DESTINATION"),
        (["get", "/dev/shm/x"], "Missing argument 'DESTINATION'"),
        (["frobnicate"], "frobnicate"),
        (["frobnicate", "it"], "frobnicate"),
        (["--bogus"], "--bogus"),
        (["info"], "Missing argument"),
    ],
)
def test_wrong_usage(words: list[str], said: str) -> None:
    complains(ivshmemfs(*words), 1, said)


def test_help_and_version() -> None:
    for words in (["--help"], ["mount", "--help"], ["umount", "-h"], ["dump", "--help"]):
        result = ivshmemfs(*words)
        assert result.returncode == 0
        assert "Usage: ivshmemfs" in result.stdout
    assert __version__ in ivshmemfs("--version").stdout
    assert importlib.metadata.version("ivshmemfs") == __version__
