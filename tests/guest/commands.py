"""Runs several commands in one process: starting Python takes seconds in an emulated guest.

The only argument is a JSON list of commands, each a list of words: one of the project's commands,
or shell text after ``sh``.  Prints a JSON list of [exit status, stdout, stderr].
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def entry(name: str) -> Callable[[list[str]], None]:
    """The main() behind a command's name."""
    if name == "mkfs.ivshmemfs":
        from mkfs.main import main as mkfs

        return mkfs
    from ivshmemfs.cli.main import main as ivshmemfs

    return ivshmemfs


def run(words: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    if words[0] == "sh":
        done = subprocess.run(
            ["/bin/sh", "-euc", words[1]], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry(words[0])(words[1:])
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([run(words) for words in json.loads(sys.argv[1])]))
