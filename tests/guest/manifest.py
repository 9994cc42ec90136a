"""Print what a directory holds, as JSON: a check that two machines see the same tree.

Run on the host and in guests by the system's Python, without the project.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys


def describe(path: str) -> list[object]:
    """Mode, modification time in ns, and what the entry holds."""
    status = os.lstat(path)
    content: object = None
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = [status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return [status.st_mode, status.st_mtime_ns, content]


def manifest(top: str) -> dict[str, list[object]]:
    """Every entry below `top` by its relative path."""
    found = {}
    for place, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(place, name)
            found[os.path.relpath(path, top)] = describe(path)
    return found


if __name__ == "__main__":
    json.dump(manifest(sys.argv[1]), sys.stdout)
