"""The life of a mount: how it begins, what it says when it cannot, and the ways it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import daemon, lifeline, mountpoint
from tests.fuse.fake_mount import FAKE, FakeMount
from tests.support.mounts import PATIENCE, eventually, mount_lines, needs_fuse, release, run, stop

pytestmark = needs_fuse

MountFactory = Callable[..., FakeMount]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; a mount there is released in the end."""
    path = tmp_path / "place"
    path.mkdir()
    try:
        yield path
    finally:
        release(path)


def start(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Mount the test double in the background."""
    return run(sys.executable, FAKE, *words, env=environment)


def left(faults: Path) -> bool:
    """Whether the engine was left in order."""
    return faults.with_name(faults.name + ".left").exists()


# --- beginning --------------------------------------------------------------------------------


def test_a_background_mount_returns_when_it_can_be_used(place: Path) -> None:
    result = start(place)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (place / "f").write_text("at once")
    assert (place / "f").read_text() == "at once"
    daemon.umount(str(place))


def test_the_daemon_lets_go_of_everything_it_inherited(place: Path, tmp_path: Path) -> None:
    with open(tmp_path / "inherited", "w") as file:
        os.set_inheritable(file.fileno(), True)
        subprocess.run(
            [sys.executable, str(FAKE), str(place)],
            close_fds=False,
            check=True,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": str(FAKE.parent.parent.parent)},
        )
        holders = [
            link
            for link in Path("/proc").glob("[0-9]*/fd/*")
            if link.parent.parent.name != str(os.getpid()) and _target(link) == file.name
        ]
    assert holders == []
    daemon.umount(str(place))


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_how_a_mount_looks(mount: MountFactory) -> None:
    one = mount("--source", "/dev/shm/with, comma and \\ more")
    fields = mount_lines(one.path)[0].split()
    assert {"nosuid", "nodev", "rw"} <= set(fields[5].split(","))
    assert fields[fields.index("-") + 1] == "fuse.ivshmemfs"
    entry = mountpoint.find(str(one.path))
    assert entry is not None
    assert entry.source == "/dev/shm/with, comma and \\ more"
    # The kernel has nothing to check where only root may come in.
    assert ("default_permissions" in mount_lines(one.path)[0]) == (os.geteuid() != 0)
    other = mount("-o", "allow_other")
    assert "default_permissions" in mount_lines(other.path)[0]


def test_options_of_the_kernel(mount: MountFactory) -> None:
    one = mount("-o", "ro,noexec,noatime,allow_other")
    fields = mount_lines(one.path)[0].split()
    assert {"ro", "noexec", "noatime", "nosuid", "nodev"} <= set(fields[5].split(","))
    assert "allow_other" in fields[-1]
    with pytest.raises(OSError, match="Read-only"):
        (one.path / "f").touch()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may ask for it")
def test_suid_and_dev_when_asked_for(mount: MountFactory) -> None:
    one = mount("-o", "suid,dev")
    words = mount_lines(one.path)[0].split()[5].split(",")
    assert "nosuid" not in words
    assert "nodev" not in words


def test_a_notice_is_passed_on(place: Path) -> None:
    result = start(place, FAKE_NOTICE="the mapping is slow: 40 MB/s")
    assert result.returncode == 0
    assert result.stdout == "the mapping is slow: 40 MB/s"


def test_relative_paths_and_links(tmp_path: Path, place: Path) -> None:
    (tmp_path / "link").symlink_to("place")
    result = run(sys.executable, FAKE, "link", cwd=tmp_path)
    assert result.returncode == 0
    assert mount_lines(place)
    daemon.umount(str(tmp_path / "link"))
    assert not mount_lines(place)


# --- refusals ---------------------------------------------------------------------------------


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check that a mount ended with *code* and one line that has all *words* in it."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_missing_mount_point(tmp_path: Path) -> None:
    refused(start(tmp_path / "nowhere"), 32, "does not exist", "create the directory")


def test_mount_point_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(start(tmp_path / "file"), 32, "is not a directory")


def test_mount_point_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(start(tmp_path / "file" / "below"), 32, "cannot be used", "Not a directory")


def test_mount_point_that_is_in_use(mount: MountFactory) -> None:
    one = mount()
    refused(start(one.path), 32, "is busy", "fake is mounted there already", "umount")
    assert len(mount_lines(one.path)) == 1


def test_mount_point_of_another_filesystem() -> None:
    refused(start("/proc"), 32, "is busy", "proc is mounted there")


def test_an_engine_that_refuses_leaves_nothing(place: Path) -> None:
    refused(start(place, FAKE_ATTACH="Corrupt"), 1, "block 7 is torn")
    assert not mount_lines(place)


def test_a_limit_on_threads_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    error = daemon._bug("/mnt", RuntimeError("can't start new thread"))
    assert error.exit_code == daemon.EXIT_SYSTEM
    assert "raise the limits" in str(error)
    caplog.clear()


def test_a_bug_before_the_mount_is_one_line(place: Path) -> None:
    refused(start(place, FAKE_ATTACH="KeyError"), 4, "internal error: KeyError")
    assert not mount_lines(place)


def test_a_daemon_that_dies_before_it_is_ready(place: Path) -> None:
    refused(start(place, FAKE_ATTACH="die"), 4, "died before it was ready", "signal 6")


def test_a_log_file_that_cannot_be_written(place: Path) -> None:
    refused(start("-o", f"log={place}", place), 32, "log file", "cannot be written")
    assert not mount_lines(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_no_permission_on_the_fuse_device(place: Path, tmp_path: Path) -> None:
    device = tmp_path / "fuse"
    device.touch(mode=0o600)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # one more of a run in parallel
        if parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from ivshmemfs.fuse import mountpoint\n"
        f"mountpoint.FUSE_DEVICE = {str(device)!r}\n"
        "from ivshmemfs.errors import MountError\n"
        "try: mountpoint.check_fuse_device()\n"
        "except MountError as error: print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    refused(run(sys.executable, "-c", code), 32, "no permission to open", "run as root")


def test_missing_fuse_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mountpoint, "FUSE_DEVICE", str(tmp_path / "none"))
    with pytest.raises(MountError, match="modprobe fuse"):
        mountpoint.check_fuse_device()


# --- ending -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(mnt: FakeMount, number: signal.Signals) -> None:
    (mnt.path / "f").touch()
    mnt.process.send_signal(number)
    assert mnt.process.wait(PATIENCE) == 0
    assert not mount_lines(mnt.path)
    assert left(mnt.faults)
    assert "Traceback" not in mnt.log_text()


def test_a_signal_while_the_mount_is_in_use(mnt: FakeMount) -> None:
    fd = os.open(mnt.path / "f", os.O_CREAT | os.O_RDWR)
    try:
        os.write(fd, b"x")
        mnt.process.send_signal(signal.SIGTERM)
        assert mnt.process.wait(PATIENCE) == 0
        assert not mount_lines(mnt.path)
        assert "is in use: detached" in mnt.log_text()
        with pytest.raises(OSError, match=r".") as caught:
            os.pread(fd, 1, 0)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        with suppress(OSError):  # closing tells the daemon, and it is gone
            os.close(fd)
    assert left(mnt.faults)


def test_a_signal_while_an_operation_is_waiting(mnt: FakeMount) -> None:
    (mnt.path / "link").symlink_to("target")
    mnt.fail("readlink", "Busy", 10**6)
    code = f"import os; os.readlink({str(mnt.path / 'link')!r})"
    client = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: mnt.left() < 10**6)
        started = time.monotonic()
        mnt.process.send_signal(signal.SIGTERM)
        assert mnt.process.wait(PATIENCE) == 0
        assert time.monotonic() - started < 8
        assert client.wait(PATIENCE) != 0
    finally:
        client.kill()
        client.wait(PATIENCE)
    assert left(mnt.faults)


def test_unmounting_from_outside_ends_the_daemon(mnt: FakeMount) -> None:
    assert run("fusermount3", "-u", mnt.path).returncode == 0
    assert mnt.process.wait(PATIENCE) == 0
    assert left(mnt.faults)
    assert "unmounted" in mnt.log_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="umount(8) is for root")
def test_umount_from_outside_with_umount(mnt: FakeMount) -> None:
    assert run("umount", mnt.path).returncode == 0
    assert mnt.process.wait(PATIENCE) == 0
    assert left(mnt.faults)


def test_umount_returns_when_the_region_is_left(mnt: FakeMount) -> None:
    daemon.umount(str(mnt.path))
    assert left(mnt.faults)
    assert not mount_lines(mnt.path)


def test_umount_of_a_mount_in_use(mnt: FakeMount) -> None:
    with open(mnt.path / "f", "w"):
        with pytest.raises(MountError, match=r"is in use.*--lazy") as caught:
            daemon.umount(str(mnt.path))
        assert caught.value.exit_code == 32
        assert mnt.alive
        daemon.umount(str(mnt.path), lazy=True)
        assert not mount_lines(mnt.path)
    assert mnt.process.wait(PATIENCE) == 0


def test_umount_of_what_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="is not mounted"):
        daemon.umount(str(tmp_path))
    with pytest.raises(MountError, match="not an ivshmemfs mount but proc"):
        daemon.umount("/proc")


def test_a_killed_daemon_leaves_a_mount_that_can_be_cleared(mnt: FakeMount) -> None:
    mnt.process.kill()
    mnt.process.wait(PATIENCE)
    with pytest.raises(OSError, match=r".") as caught:
        os.listdir(mnt.path)
    assert caught.value.errno == errno.ENOTCONN
    refused(start(mnt.path), 32, "is busy", "umount", "dead")
    daemon.umount(str(mnt.path))
    assert not mount_lines(mnt.path)
    assert os.listdir(mnt.path) == []


def test_a_stopped_daemon_can_be_unmounted(mnt: FakeMount) -> None:
    stop(mnt.process.pid)
    started = time.monotonic()
    with pytest.raises(MountError, match=f"process {mnt.process.pid}.*is stopped.*kill -CONT"):
        daemon.umount(str(mnt.path))
    assert time.monotonic() - started < 5
    assert not mount_lines(mnt.path)
    mnt.process.send_signal(signal.SIGCONT)
    assert mnt.process.wait(PATIENCE) == 0
    assert left(mnt.faults)


def test_an_automounter_s_own_helper_may_mount_over_autofs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """tests/test_systemd.py has systemd do it."""
    for group, allowed in ((os.getpgrp(), True), (os.getpgrp() + 1, False)):
        (tmp_path / "mountinfo").write_text(
            f"40 1 0:45 / {tmp_path} rw - autofs systemd-1 rw,fd=51,pgrp={group},timeout=0\n"
        )
        entries = mountpoint.mounted(str(tmp_path / "mountinfo"))
        monkeypatch.setattr(mountpoint, "mounted", lambda entries=entries: entries)
        assert mountpoint.is_asked_for(str(tmp_path)) is allowed
        if allowed:
            assert mountpoint.check(str(tmp_path)) == str(tmp_path)
        else:
            with pytest.raises(MountError, match="is an automount point: use a file there"):
                mountpoint.check(str(tmp_path))
        monkeypatch.undo()


def test_a_small_image_without_mtab_is_told_from_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a root as debootstrap makes it, fusermount3 does not unmount for a user."""
    helper = tmp_path / "fusermount3"
    helper.write_text(
        "#!/bin/sh\necho 'fusermount3: failed to open /etc/mtab: No such file or directory' >&2\n"
        "exit 1\n"
    )
    helper.chmod(0o755)
    monkeypatch.setattr(mountpoint, "helper", lambda: str(helper))
    monkeypatch.setattr(mountpoint, "_umount2", lambda path, lazy: False)
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/etc/mtab" and exists(path))
    with pytest.raises(MountError, match="ln -s /proc/self/mounts /etc/mtab"):
        mountpoint.unmount("/mnt/none")


def test_nothing_looks_at_a_mount_whose_daemon_is_stopped(mnt: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mnt.path)
    stop(mnt.process.pid)
    for path in (mnt.path, tmp_path / "link", tmp_path / "link" / ".", mnt.path / ".." / "mnt"):
        assert mountpoint.resolve(str(path)) == str(mnt.path)
        with pytest.raises(MountError, match="is busy"):
            mountpoint.check(str(path))
    below = tmp_path / "link" / "below" / "it"
    assert mountpoint.resolve(str(below)) == str(mnt.path / "below" / "it")
    entry = mountpoint.enclosing(str(below))
    assert entry is not None
    assert entry.path == str(mnt.path)
    with pytest.raises(MountError, match="is stopped"):
        mountpoint.check(str(below))
    assert not mountpoint.answers(entry.path, 0.2)
    daemon.umount(str(tmp_path / "link"), lazy=True)
    assert not mount_lines(mnt.path)


def test_paths_are_resolved_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "to b").symlink_to("a/b")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a" / "..")
    for path in ("to b", "to b/..", "a/up/to b/.", "a//up/a/./b", "to b/none", "none/../a", "."):
        assert mountpoint.resolve(f"{tmp_path}/{path}") == os.path.realpath(f"{tmp_path}/{path}")
    assert mountpoint.resolve("/") == "/"
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(MountError, match="too many symbolic links"):
        mountpoint.resolve(f"{tmp_path}/ring")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may do without fusermount3")
def test_unmounting_without_fusermount(mnt: FakeMount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "helper", lambda: None)
    with open(mnt.path / "f", "w"), pytest.raises(mountpoint.BusyMount):
        mountpoint.unmount(str(mnt.path))
    mountpoint.unmount(str(mnt.path))
    assert not mount_lines(mnt.path)


def test_a_daemon_that_lingers_does_not_hold_up_the_next_mount_of_its_number() -> None:
    """The kernel reuses the device number of a mount that is gone before its daemon is."""
    device = f"test {os.getpid()}"
    assert lifeline.grasp(device) is None
    lingering = lifeline.hold(device)
    mounted = lifeline.hold(device)
    grip = lifeline.grasp(device)
    assert lingering is not None
    assert mounted is not None
    assert grip is not None
    assert not lifeline.wait_for_end(grip, 0.1)
    mounted.close()
    assert lifeline.wait_for_end(grip, PATIENCE)
    old = lifeline.grasp(device)
    assert old is not None
    later = lifeline.hold(device)
    lingering.close()
    assert lifeline.wait_for_end(old, PATIENCE)
    assert later is not None
    new = lifeline.grasp(device)  # although its number is not the first
    assert new is not None
    later.close()
    assert lifeline.wait_for_end(new, PATIENCE)
    assert lifeline.grasp(device) is None
    grip.close()
    old.close()
    new.close()


def test_an_engine_that_cannot_leave(mnt: FakeMount) -> None:
    mnt.fail("unmount", "KeyError")
    daemon.umount(str(mnt.path))
    assert mnt.process.wait(PATIENCE) == 4
    assert "KeyError" in mnt.log_text()


# --- upkeep and idleness ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["poll", "trio"])
def test_upkeep_goes_on_also_under_load(mount: MountFactory, loop: str) -> None:
    one = mount("-o", f"loop={loop}")

    def ticks() -> int:
        return int(os.getxattr(one.path, "user.ticks"))

    assert eventually(lambda: "user.ticks" in os.listxattr(one.path), 5)
    before = ticks()
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        os.stat(one.path)
    assert 1 <= ticks() - before <= 5


def test_upkeep_that_fails_is_tried_again(mnt: FakeMount) -> None:
    for exception in ("Busy", "KeyError", "MemoryError"):
        mnt.fail("tick", exception)
        assert eventually(lambda: mnt.left() == 0, 5)
    assert eventually(lambda: "user.ticks" in os.listxattr(mnt.path), 5)
    before = int(os.getxattr(mnt.path, "user.ticks"))
    assert eventually(lambda: int(os.getxattr(mnt.path, "user.ticks")) > before, 5)
    assert mnt.alive


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["poll", "trio"])
def test_an_idle_mount_uses_next_to_no_time(mount: MountFactory, loop: str) -> None:
    one = mount("-o", f"loop={loop}")
    (one.path / "f").write_text("x")
    time.sleep(0.5)

    def used() -> float:
        schedstat = Path(f"/proc/{one.process.pid}/schedstat").read_text()
        return int(schedstat.split()[0]) / 1e9

    shares = []
    for _attempt in range(4):  # what else runs here makes any single look dearer than it is
        before = used()
        time.sleep(2)
        shares.append((used() - before) / 2)
        if shares[-1] < 0.005:
            return
    pytest.fail(f"an idle mount uses {min(shares):.2%} of a CPU")


# --- logs -------------------------------------------------------------------------------------


def test_a_repeated_complaint_is_logged_once(mnt: FakeMount) -> None:
    mnt.fail("statfs", "Corrupt", 50)
    for _number in range(50):
        with pytest.raises(OSError, match=r"."):
            os.statvfs(mnt.path)
    assert mnt.log_text().count("block 7 is torn") == 1


def test_foreground_logs_to_stderr(place: Path) -> None:
    command = [sys.executable, str(FAKE), "-f", str(place)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(FAKE.parent.parent.parent)},
    ) as process:
        try:
            assert eventually(lambda: mount_lines(place))
            assert os.listdir(place) == []  # waits until the daemon serves
            daemon.umount(str(place))
            assert process.wait(PATIENCE) == 0
            assert process.stderr is not None
            assert b"mounted" in process.stderr.read()
        finally:
            process.kill()


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """Where the kernel shows its FUSE connections."""
    path = tmp_path / "connections"
    path.mkdir()
    if run("mount", "-t", "fusectl", "none", path).returncode:
        pytest.skip("connections cannot be aborted here")
    try:
        yield path
    finally:
        run("umount", path)


@pytest.mark.parametrize("loop", ["poll", "trio"])
def test_an_aborted_connection_is_an_end(mount: MountFactory, connections: Path, loop: str) -> None:
    """Of an administrator, or of a forced unmount: one mount less, and no failure."""
    mnt = mount("-o", f"loop={loop}")
    (mnt.path / "f").touch()
    number = os.minor(os.stat(mnt.path).st_dev)
    (connections / str(number) / "abort").write_text("1")
    assert mnt.process.wait(PATIENCE) == 0
    assert left(mnt.faults)
    assert not mount_lines(mnt.path)
    log = mnt.log_text()
    assert "ERROR" not in log, log
    assert "Traceback" not in log
