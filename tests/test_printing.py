"""Text that is printed or logged cannot drive a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.cli.output import table, width
from ivshmemfs.fuse import logs
from ivshmemfs.printing import printable, say, shown

#: ESC, line ends, C1 controls, bidi controls, a line separator, and a byte that is not UTF-8.
NASTY = "\x1b[31m \n\r\t \x07 \x85\x9b \u202e\u2066 \u200b\u2028 \udcff \ufeff \u00a0"


def test_nothing_that_drives_a_terminal_is_left() -> None:
    assert printable(NASTY).isprintable()
    assert printable("\x1b\n\udc9b\u202e") == "\\x1b\\n\\x9b\\u202e"
    assert shown(b"\x1b\xff\xc3\xa4") == "\\x1b\\xffä"


def test_plain_text_stays_as_it_is() -> None:
    for text in ("", "a b", "größe", "\u4e2d\u6587", "back\\slash", "\N{SLIGHTLY SMILING FACE}"):
        assert printable(text) == text
    assert printable(printable(NASTY)) == printable(NASTY)


def test_one_line_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(NASTY)
    say(NASTY, err=True)
    out, err = capsys.readouterr()
    assert out == err == printable(NASTY) + "\n"


def test_columns_are_aligned_whatever_is_in_them() -> None:
    cells = ["plain", "\u4e2d\u6587", "e\u0301", "\x1b[2J", "\uff21"]
    lines = table([(cell, "|") for cell in cells])
    assert {width(line) for line in lines} == {width(lines[0])}
    assert all(line.isprintable() for line in lines)
    assert width("\u4e2d\u6587") == 4
    assert width("e\u0301") == 1
    assert table([]) == []


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield root
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:], logging.raiseExceptions = before, raising
    root.setLevel(level)


def test_the_log_is_escaped(tmp_path: Path, root_logger: logging.Logger) -> None:
    logs.configure(str(tmp_path / "log"), foreground=False)
    root_logger.error("name %s", NASTY)
    try:
        raise ValueError(NASTY)
    except ValueError:
        root_logger.critical("a traceback", exc_info=sys.exc_info())
    text = (tmp_path / "log").read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "name \\x1b[31m" in text
    assert "Traceback (most recent call last):\n" in text
