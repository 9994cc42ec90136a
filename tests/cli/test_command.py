"""What all commands share: closed and full standard streams, signals at any time, old libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO
from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import ENVIRONMENT, TOP, mount_lines, needs_fuse, release, run
from tests.support.regions import TestRegion, put

COMMANDS = {
    "ivshmemfs": ["-m", "ivshmemfs", "info"],
    "fsck.ivshmemfs": ["-m", "ivshmemfs.fsck"],
    "mkfs.ivshmemfs": ["-m", "mkfs", "--force"],
}
EVERY = pytest.mark.parametrize("name", COMMANDS)


def through_shell(name: str, region: Path, redirected: str) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected as a shell does it."""
    return run("sh", "-c", f'"$0" "$@" {redirected}', sys.executable, *COMMANDS[name], region)


@EVERY
def test_a_full_standard_output_is_named(formatted: TestRegion, name: str) -> None:
    result = through_shell(name, formatted.path, ">/dev/full")
    assert result.returncode in (1, 2, 8)
    assert result.stderr == f"{name}: write error: standard output: No space left on device\n"


@EVERY
def test_a_full_standard_error_changes_no_exit_code(name: str) -> None:
    loud = through_shell(name, Path("/none/such"), "")
    silent = through_shell(name, Path("/none/such"), "2>/dev/full")
    assert loud.stderr.count("\n") == 1
    assert (silent.returncode, silent.stdout, silent.stderr) == (loud.returncode, "", "")


@EVERY
def test_a_reader_that_goes_away_is_no_error_to_tell(formatted: TestRegion, name: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as pipe:
        result = subprocess.run(
            [sys.executable, *COMMANDS[name], str(formatted.path)],
            stdout=pipe, stderr=subprocess.PIPE, check=False, env=ENVIRONMENT, timeout=60,
        )  # fmt: skip
    assert result.stderr == b""


@EVERY
@pytest.mark.parametrize("closed", ["2>&-", "0<&-", "0<&- 2>&-"])
def test_closed_streams(formatted: TestRegion, name: str, closed: str) -> None:
    result = through_shell(name, formatted.path, closed)
    assert (result.returncode, result.stderr, result.stdout != "") == (0, "", True)


@EVERY
@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&-", "0<&- 1>&- 2>&-"])
def test_what_prints_to_a_closed_stream_fails(
    formatted: TestRegion, name: str, closed: str
) -> None:
    result = through_shell(name, formatted.path, closed)
    said = f"{name}: write error: standard output: Bad file descriptor\n"
    assert result.returncode in (1, 2, 8)
    assert result.stderr == ("" if "2>&-" in closed else said)


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("put", "--force", "{}", "-", "/there"), 2, "Bad file descriptor"),
        (("send", "--records", "4", "{}:/queue"), 1, "standard input: Bad file descriptor"),
        (
            ("send", "--records", "4", "--whole", "{}:/queue"),
            1,
            "standard input: Bad file descriptor",
        ),
    ],
)
def test_a_closed_standard_input_is_not_empty(
    formatted: TestRegion, words: tuple[str, ...], code: int, reason: str
) -> None:
    fs = formatted.mount()
    put(fs, ROOT_INO, b"there", b"content")
    here = [word.format(formatted.path) for word in words]
    result = run("sh", "-c", '"$0" "$@" 0<&-', sys.executable, "-m", "ivshmemfs", *here)
    complains(result, code, reason)
    assert fs.lookup(ROOT_INO, b"there").size == len(b"content")


@pytest.mark.parametrize(
    "words",
    [
        ("wait", "-t", "nan"), ("send", "-t", "nan"), ("receive", "-t", "inf"),
        ("lock", "-w", "nan"), ("lock", "-w", "-1"), ("lock", "-E", "256"), ("lock", "-E", "-1"),
        ("top", "-d", "nan"), ("top", "-d", "1e300"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(formatted: TestRegion, words: list[str]) -> None:
    place = f"{formatted.path}" if words[0] == "top" else f"{formatted.path}:/file"
    complains(ivshmemfs(*words, place, "true"), 1, f"Invalid value for '{words[1]}'")


def test_a_closed_standard_output_takes_no_file(formatted: TestRegion) -> None:
    put(formatted.mount(), ROOT_INO, b"there", b"content")
    for words in (("cat", f"{formatted.path}:/there"), ("get", formatted.path, "/there", "-")):
        result = run("sh", "-c", '"$0" "$@" 1>&-', sys.executable, "-m", "ivshmemfs", *words)
        complains(result, 2, "Bad file descriptor")


@needs_fuse
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_mounting_with_closed_streams(formatted: TestRegion, place: Path, closed: str) -> None:
    words = [sys.executable, "-m", "ivshmemfs", "mount", formatted.path, place]
    result = run("sh", "-c", f'"$0" "$@" {closed}', *words)
    try:
        assert (result.returncode, result.stderr) == (0, "")
        (place / "f").write_text("served")
        assert (place / "f").read_text() == "served"
    finally:
        assert ivshmemfs("umount", place).returncode == 0


STARTED = """
import os, sys
from importlib.abc import MetaPathFinder
class Sender(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sender())
import ivshmemfs.__main__ as start
sys.argv = {words!r}
start.{function}()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("function", "module", "code"),
    [
        ("ivshmemfs", "click", 8),
        ("ivshmemfs", "ivshmemfs.cli.info", 8),
        ("mkfs", "click", 1),
        ("mkfs", "mkfs.main", 1),
        ("fsck", "click", 32),
    ],
)
def test_a_signal_while_the_command_is_loaded(
    number: int, function: str, module: str, code: int
) -> None:
    script = STARTED.format(
        module=module, number=int(number), function=function, words=["", "list"]
    )
    result = run(sys.executable, "-c", script)
    name = function if function == "ivshmemfs" else f"{function}.ivshmemfs"
    assert (result.returncode, result.stderr) == (code, f"{name}: interrupted\n")


@pytest.mark.parametrize(("function", "code"), [("ivshmemfs", 2), ("mkfs", 1), ("fsck", 8)])
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, function: str, code: int) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('no click here')\n")
    script = f"from ivshmemfs.__main__ import {function}; {function}()"
    result = run(sys.executable, "-c", script, env={"PYTHONPATH": f"{tmp_path}:{TOP}"})
    name = function if function == "ivshmemfs" else f"{function}.ivshmemfs"
    assert (result.returncode, result.stderr) == (code, f"{name}: no click here\n")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    script = STARTED.format(
        module="click", number=int(signal.SIGHUP), function="ivshmemfs", words=["", "--version"]
    )
    result = run("sh", "-c", 'trap \'\' HUP; exec "$0" "$@"', sys.executable, "-c", script)
    assert (result.returncode, result.stderr) == (0, "")


ENDING = """
import atexit, os, signal, sys, threading, time
from ivshmemfs import command

class Kept:
    def __del__(self):
        os.write(1, b"freed ")

def work():
    {work}

def main():
    code = command.run("name", work, command.Exits(1, 2, 3, 4))
    {after}
    sys.exit(code)

kept = Kept()
atexit.register(print, "exit functions ran")
command.begin("name", interrupted=9)
command.conclude(main)
"""


@pytest.mark.parametrize(
    ("work", "after", "code", "out", "err"),
    [
        ("return 5", "", 5, "exit functions ran\n", ""),
        ("raise OSError(5, 'broken')", "", 2, "exit functions ran\n", "name: broken\n"),
        ("pass", "sys.exit('text')", 1, "exit functions ran\nfreed ", "text\n"),
        (
            "threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()", "",
            0, "late\nexit functions ran\nfreed ", "",
        ),
        ("return 5", "os.kill(os.getpid(), signal.SIGTERM)", 5, "exit functions ran\n", ""),
        (
            "os.kill(os.getpid(), signal.SIGINT)", "", 3, "exit functions ran\n",
            "name: interrupted\n",
        ),
        (
            """
    try: os.kill(os.getpid(), signal.SIGTERM)
    finally: os.kill(os.getpid(), signal.SIGTERM); print("cleaned", flush=True)""", "",
            3, "cleaned\nexit functions ran\n", "name: interrupted\n",
        ),
        (
            """
    try: os.kill(os.getpid(), signal.SIGTERM)
    finally: time.sleep(1.1); os.kill(os.getpid(), signal.SIGTERM); print("cleaned")""", "",
            3, "", "",
        ),
    ],
    ids=["code", "error", "text", "thread", "signal after the end", "signal", "twice", "at last"],
)  # fmt: skip
def test_the_end_keeps_the_code_and_calls_the_exit_functions(
    work: str, after: str, code: int, out: str, err: str
) -> None:
    result = run(sys.executable, "-c", ENDING.format(work=work, after=after))
    assert (result.returncode, result.stdout, result.stderr) == (code, out, err)


def test_what_cannot_be_printed_in_the_end_changes_no_exit_code() -> None:
    script = ENDING.format(work="return 5", after="sys.stdout = open('/dev/full', 'w')")
    result = run(sys.executable, "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (5, "", "")


@needs_fuse
def test_a_signal_while_the_daemon_starts(formatted: TestRegion, place: Path) -> None:
    script = STARTED.format(
        module="pyfuse3", number=int(signal.SIGTERM), function="ivshmemfs",
        words=["", "mount", str(formatted.path), str(place)],
    )  # fmt: skip
    try:
        complains(run(sys.executable, "-c", script), 8, "interrupted")
        assert not mount_lines(place)
    finally:
        release(place)
    assert "no machine" in ivshmemfs("peers", formatted.path).stdout


@pytest.mark.parametrize(
    ("words", "code"),
    [(["-m", "ivshmemfs", "--version"], 0), (["-m", "ivshmemfs.cli", "--version"], 0)],
)
def test_as_modules(words: list[str], code: int) -> None:
    result = run(sys.executable, *words)
    assert result.returncode == code
    assert "version" in result.stdout
