"""What each thread of the kernel's side looked up last, so that no rename is skipped.

rename(2) looks its two names up, one after the other.  When both lead to one inode, the kernel
returns success without asking: they are hard links.  But when another machine renamed the file
between the two look-ups, both led to it as well, although never at one moment.  Then two machines
would both be told that they renamed it.

So the answer to a look-up must not name the number that the same thread was told for the name
before, unless both names lead to the inode at one moment.  For the same reason a name that is
looked up twice is still compared with the name before it: the kernel asks again when it believes
something else of a name.

A name that this mount itself changed since is no such case: rename(2) locks both directories before
it looks its names up, so this kernel changes neither meanwhile. Programs that look at the old name
of a directory, and then at the new one, must find the same directory: somebody may stand in it.

States of a thread:

    unknown     it looked nothing up, or has changed names since then (`forget`)
    walking     `last` is what it was told last; `source` what it was told before, by another name

The table is bounded: a thread that looks nothing up while MANY others do is forgotten.  Threads of
other pid namespaces all have number 0 here; what they look up is kept by inode instead.
"""

from __future__ import annotations

#: Threads that are remembered at least; at most twice as many.
MANY = 2048

#: The answer to a look-up: the kernel's number of the directory, the name, the inode that it leads
#: to, the kernel's number of that, and `Walks.changes` then.  A plain tuple, because every look-up
#: makes one.
Step = tuple[int, bytes, int, int, int]
_Walk = tuple[Step, Step | None]


class Walks:
    """The last steps of each thread."""

    def __init__(self) -> None:
        # By thread: its last step, and the one before it by another name.
        self._young: dict[int, _Walk] = {}
        self._old: dict[int, _Walk] = {}
        self.changes = 0  # of names, by this mount
        # By the inode of the directory and the name: the number of the last change.
        self._changed: dict[tuple[int, bytes], int] = {}
        self._changed_before: dict[tuple[int, bytes], int] = {}

    def _get(self, key: int) -> _Walk | None:
        return self._young.get(key) or self._old.get(key)

    def source(self, thread: int, parent: int, name: bytes, ino: int) -> Step | None:
        """What a thread was told before for another name than this, which leads to `ino`."""
        walk = self._get(thread or -ino)
        if walk is None:
            return None
        last = walk[0]
        return walk[1] if last[1] == name and last[0] == parent else last

    def note(self, thread: int, step: Step, source: Step | None) -> None:
        """A thread is told `step`, and before that by another name `source`."""
        key = thread or -step[2]
        young = self._young
        if len(young) >= MANY and key not in young:
            self._old = young
            young = self._young = {}
        young[key] = step, source

    def forget(self, thread: int, ino: int = 0) -> None:
        """A thread changed what names lead to, or shall be told afresh."""
        key = thread or -ino
        self._young.pop(key, None)
        self._old.pop(key, None)

    def was_told(self, thread: int, ino: int, node: int) -> bool:
        """Whether a thread has just been told the number `node` for `ino`."""
        walk = self._get(thread or -ino)
        return walk is not None and walk[0][3] == node

    def change(self, folder: int, name: bytes) -> None:
        """This mount has changed what a name in the directory with the inode `folder` leads to."""
        self.changes += 1
        if len(self._changed) >= MANY:
            self._changed_before, self._changed = self._changed, {}
        self._changed[folder, name] = self.changes

    def is_changed(self, folder: int, step: Step) -> bool:
        """Whether it did so to the name of `step`, in the directory with the inode `folder`, since
        that was told; not, when that is forgotten.
        """
        key = folder, step[1]
        last = self._changed.get(key) or self._changed_before.get(key, 0)
        return last > step[4]
