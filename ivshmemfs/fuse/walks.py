"""What each thread of the kernel's side looked up last, so that no rename is skipped.

rename(2) looks its two names up, one after the other.  When both lead to one inode, the kernel
returns success without asking: they are hard links.  But when another machine renamed the file
between the two look-ups, both led to it as well, although never at one moment.  Then two machines
would both be told that they renamed it.

So the answer to a look-up must not name the number that the same thread was told for the name
before, unless both names lead to the inode at one moment.  For the same reason a name that is
looked up twice is still compared with the name before it: the kernel asks again when it believes
something else of a name.

States of a thread:

    unknown     it looked nothing up, or has changed names since then (`forget`)
    walking     `last` is what it was told last; `source` what it was told before, by another name

The table is bounded: a thread that looks nothing up while MANY others do is forgotten.  Threads of
other pid namespaces all have number 0 here; what they look up is kept by inode instead.
"""

from __future__ import annotations

from typing import NamedTuple

#: Threads that are remembered at least; at most twice as many.
MANY = 2048


class Step(NamedTuple):
    """The answer to one look-up."""

    parent: int  # the kernel's number of the directory
    name: bytes
    ino: int
    node: int  # the kernel's number of what was found


class Walks:
    """The last steps of each thread."""

    def __init__(self) -> None:
        # By thread: its last step, and the one before it by another name.
        self._young: dict[int, tuple[Step, Step | None]] = {}
        self._old: dict[int, tuple[Step, Step | None]] = {}

    def _get(self, key: int) -> tuple[Step, Step | None] | None:
        return self._young.get(key) or self._old.get(key)

    def source(self, thread: int, parent: int, name: bytes, ino: int) -> Step | None:
        """The step before, by another name, if it found the same inode."""
        walk = self._get(thread or -ino)
        if walk is None:
            return None
        last, source = walk
        if last.name != name or last.parent != parent:
            source = last
        return source if source is not None and source.ino == ino else None

    def note(self, thread: int, step: Step) -> None:
        """A thread is told `step`."""
        key = thread or -step.ino
        walk = self._get(key)
        source = None
        if walk is not None:
            last, source = walk
            if last.name != step.name or last.parent != step.parent:
                source = last
        if len(self._young) >= MANY and key not in self._young:
            self._old, self._young = self._young, {}
        self._young[key] = step, source

    def forget(self, thread: int, ino: int = 0) -> None:
        """A thread changed what names lead to, or shall be told afresh."""
        key = thread or -ino
        self._young.pop(key, None)
        self._old.pop(key, None)

    def was_told(self, thread: int, ino: int, node: int) -> bool:
        """Whether a thread has just been told the number `node` for `ino`."""
        walk = self._get(thread or -ino)
        return walk is not None and walk[0].node == node
