"""The commands with shorter waits: ``python -m tests.support.impatient NAME=SECONDS ... WORD ...``.

For tests that want the end of a wait, not its length.  A name is one of `WAITS`.
"""

from __future__ import annotations

import importlib
import sys

#: Where the wait of each name is declared.
WAITS = {
    "SILENCE": "ivshmemfs.shm.watch",
    "SILENT": "ivshmemfs.engine.locks",
    "REPAIR_SECONDS": "ivshmemfs.cli.attach.peer",
}


def main() -> None:
    words = sys.argv[1:]
    while words and "=" in words[0] and words[0].partition("=")[0] in WAITS:
        name, _, seconds = words.pop(0).partition("=")
        module = importlib.import_module(WAITS[name])
        assert isinstance(getattr(module, name), float)
        setattr(module, name, float(seconds))
    sys.argv[1:] = words
    from ivshmemfs.__main__ import ivshmemfs  # takes over what is set above

    ivshmemfs()


if __name__ == "__main__":
    main()
