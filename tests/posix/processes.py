"""Calls that several processes make at the same moment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence


def in_processes(calls: Sequence[Callable[[], object]], seconds: float = 120) -> None:
    """Run each call in a process of its own, all at once; all must succeed."""
    ready, go = os.pipe()
    children = []
    for call in calls:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(go)
                os.read(ready, 1)
                call()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        children.append(pid)
    os.close(ready)
    os.close(go)
    end = time.monotonic() + seconds
    codes: list[int] = []
    for pid in children:
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, 9)
            time.sleep(0.005)
        codes.append(os.waitstatus_to_exitcode(status[1]))
    assert codes == [0] * len(calls)
