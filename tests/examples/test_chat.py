"""examples/chat.py: what one person types, the others read, also those that come later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.checks import assert_clean
from tests.support.mounts import ENVIRONMENT, PATIENCE, TOP
from tests.support.regions import new_region

#: What the others are shown of it: no control character.
HELLO = "ada: h\u00e9llo \\x1b[31mred\n".encode()


def person(region: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the program for a person."""
    return subprocess.Popen(
        [sys.executable, str(TOP / "examples" / "chat.py"), str(region), name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=TOP,
    )  # fmt: skip


def said(who: subprocess.Popen[bytes]) -> bytes:
    """The next line that a person is shown."""
    assert who.stdout is not None
    return who.stdout.readline()


def say(who: subprocess.Popen[bytes], line: bytes) -> None:
    """Type a line."""
    assert who.stdin is not None
    who.stdin.write(line + b"\n")
    who.stdin.flush()


def test_three_people() -> None:
    with new_region(16 << 20) as made:
        people = [person(made.path, name) for name in ("ada", "bob")]
        ada, bob = people
        say(ada, "h\u00e9llo \x1b[31mred".encode())
        assert said(bob) == HELLO
        say(bob, b"hi")
        assert said(ada) == b"bob: hi\n"
        people.append(late := person(made.path, "eve"))
        assert [said(late), said(late)] == [HELLO, b"bob: hi\n"]
        say(late, b"x" * 5000)
        assert said(ada) == said(bob) == b"eve: " + b"x" * 995 + b"\n"
        for who in people:
            who.communicate(timeout=PATIENCE)
            assert who.returncode == 0
        assert_clean(made)
