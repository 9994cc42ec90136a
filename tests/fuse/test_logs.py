"""The daemon's log stays readable, also when a region or a peer chooses its words."""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from ivshmemfs.fuse import logs
from ivshmemfs.fuse.logs import Limited
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import needs_fuse, run


class Kept(logging.Handler):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Log:
    """A logger with a limit, and a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.kept = Kept()
        self.limited = Limited(self.kept)
        self._logger = logging.Logger("test")
        self._logger.addHandler(self.limited)
        self.error, self.warning = self._logger.error, self._logger.warning

    @property
    def lines(self) -> list[str]:
        return self.kept.lines


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_lines_that_differ_in_names_and_numbers_are_one_kind(log: Log) -> None:
    for number in range(1500):
        name = f"it's {number}".encode() if number % 3 else b'"' + bytes([number % 256])
        log.error("lookup: name %r leads to inode %d, which does not exist", name, number)
        log.error("read: block %d at 0x%x has tag %016x", number, number, number * 2**40)
    assert len(log.lines) == 2
    log.now += 59
    log.limited.tell(log.now)
    assert len(log.lines) == 2
    log.now += 1.5
    log.limited.tell(log.now)
    assert len(log.lines) == 4
    assert re.match("1499 more like it in the last 60 s: lookup: name b.* inode 0", log.lines[2])
    log.error("lookup: name %r leads to inode %d, which does not exist", b"x", 5)
    assert log.lines[4:] == ["lookup: name b'x' leads to inode 5, which does not exist"]


def test_other_kinds_are_written_meanwhile(log: Log) -> None:
    log.error("lookup: gone")
    log.error("open: gone")
    log.warning("open: gone")
    log.error("open: gone")
    assert log.lines == ["lookup: gone", "open: gone", "open: gone"]


def test_a_line_that_comes_once_is_not_counted(log: Log) -> None:
    log.error("once")
    log.now += 100
    log.error("again")
    log.limited.flush()
    assert log.lines == ["once", "again"]


def test_the_count_is_written_at_the_end(log: Log) -> None:
    for _ in range(3):
        log.error("once")
    log.limited.flush()
    assert log.lines == ["once", "2 more like it in the last 60 s: once"]


def test_endless_kinds_are_bounded(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KINDS", 50)
    letters = "ghijklmnopqrstuvwxyz"
    for one in letters:
        for two in letters:
            log.error(f"{one}{two}")
    assert len(log.lines) == 50
    log.now += 61
    log.limited.tell(log.now)
    assert log.lines[50:] == ["350 more of other kinds in the last 60 s, such as: iq"]


@needs_fuse
def test_many_bad_names_under_a_mount(mnt: FakeMount) -> None:
    """Each damaged name is another line, but one kind."""
    mnt.fail("find", "Corrupt", 500)
    for number in range(200):
        with suppress(OSError):
            os.stat(mnt.path / f"name{number}")
    assert mnt.log_text().count("block 7 is torn") == 1
    mnt.process.terminate()
    assert mnt.process.wait(20) == 0
    assert re.search(r"\d+ more like it in the last 60 s: lookup: .*block 7", mnt.log_text())


def test_systemd_s_journal_gets_priorities_and_no_times() -> None:
    """As ivshmemfs@.service runs it; a line of a traceback has the priority of its record."""
    code = (
        "import logging, os\nfrom ivshmemfs.fuse import logs\n"
        "here = os.fstat(2)\nos.environ['JOURNAL_STREAM'] = @\n"
        "logs.configure(None, foreground=True)\n"
        "logging.info('mounted')\nlogging.warning('old')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.exception('a %s', '\\x1bfault')\n"
    )
    stream = "f'{here.st_dev}:{here.st_ino}'"
    lines = run(sys.executable, "-c", code.replace("@", stream)).stderr.splitlines()
    assert lines[:3] == ["<6>INFO: mounted", "<4>WARNING: old", "<3>ERROR: a \\x1bfault"]
    assert len(lines) > 5
    assert all(line.startswith("<3>") for line in lines[3:])
    other = run(sys.executable, "-c", code.replace("@", "'1:1'")).stderr.splitlines()
    assert other[0].endswith("INFO root: mounted")
