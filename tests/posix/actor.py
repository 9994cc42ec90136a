"""System calls as another user, in a process of their own.

A test says `user.unlink(path)`; the call runs in a child that has become that user, and what it
raises is raised in the test.  Run as a program, this file is that child.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.posix import calls as known

HERE = Path(__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}


class Actor:
    """A user with a process; attributes are the functions of `os`, and those below."""

    def __init__(self, uid: int, gid: int, groups: Sequence[int] = (), cwd: str = "/") -> None:
        self.uid, self.gid, self.groups = uid, gid, tuple(groups)
        listed = ",".join(map(str, groups))
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(uid), str(gid), listed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd, env=ENVIRONMENT,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump((name, args, kwargs), self._process.stdin)
            self._process.stdin.flush()
            failed, result = pickle.load(self._process.stdout)
            if failed:
                raise result
            return result

        return call

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


# --- functions beyond those of `os` -----------------------------------------------------------


def write_file(path: str, content: bytes = b"") -> None:
    """Write a file through an open of its own."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def create_file(path: str, mode: int = 0o644, flags: int = 0) -> None:
    """Create a file, without opening what exists for more than writing."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | flags, mode))


def read_file(path: str) -> bytes:
    """Read the beginning of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def can_open(path: str, flags: int) -> None:
    """Open and close."""
    os.close(os.open(path, flags))


def run(words: list[str]) -> int:
    """Run a program; returns its exit code."""
    return subprocess.run(words, check=False, stdout=subprocess.DEVNULL).returncode


def batch(folder: str, calls: Sequence[Any]) -> list[Any]:
    """Make many calls of `tests.posix.calls` in one directory."""
    return known.batch(folder, calls)


OWN = {f.__name__: f for f in (write_file, create_file, read_file, can_open, run, batch)}


def _serve() -> None:
    uid, gid = int(sys.argv[1]), int(sys.argv[2])
    if os.geteuid() == 0:
        os.setgroups([int(word) for word in sys.argv[3].split(",") if word])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    os.umask(0)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            name, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        call = OWN.get(name) or getattr(os, name)
        try:
            result: Any = (False, call(*args, **kwargs))
        except Exception as error:
            result = (True, error)
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
