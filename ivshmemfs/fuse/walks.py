"""The last look-ups of each calling thread, so that the kernel skips no rename.

rename(2) looks up its two names, one after the other.  If both lead to one node number, the kernel
returns success without a request: the names are hard links.  If another machine renames the file
between the two look-ups, both names lead to it as well, but never at one moment.  Then two machines
would both report that they renamed it.

So a look-up must not return the node number of the thread's look-up before it, by another name.
The exception are two names that lead to the inode at one moment.
A name that is looked up twice is compared with
the name before it, too: the kernel repeats a look-up if its own entry differs.

The rule leaves out a name that this mount changed since then.  rename(2) locks both directories
before its look-ups, so this kernel changes neither name meanwhile.  A program that looks up the old
name of a directory and then its new name must find the same directory.

States of a thread:

    unknown     it looked up nothing, or it changed a name since then (`forget`)
    walking     `last` is its last look-up; `source` is the one before it, by another name

The table is bounded: it forgets a thread after look-ups by MANY other threads.  Threads of other
pid namespaces all have number 0 here; their look-ups are kept by inode instead.
"""

from __future__ import annotations

#: Minimum number of threads in the table; the maximum is twice as many.
MANY = 2048

#: One look-up: node of the directory, name, inode found, its node, and `Walks.changes` then.
#: A plain tuple, because every look-up makes one.
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
        """Return the thread's last look-up of another name than this one, which leads to `ino`."""
        walk = self._get(thread or -ino)
        if walk is None:
            return None
        last = walk[0]
        return walk[1] if last[1] == name and last[0] == parent else last

    def note(self, thread: int, step: Step, source: Step | None) -> None:
        """Note the look-up `step` of a thread, and the one by another name before it."""
        key = thread or -step[2]
        young = self._young
        if len(young) >= MANY and key not in young:
            self._old = young
            young = self._young = {}
        young[key] = step, source

    def forget(self, thread: int, ino: int = 0) -> None:
        """Forget the look-ups of a thread, because it changed a name or walks its path again."""
        key = thread or -ino
        self._young.pop(key, None)
        self._old.pop(key, None)

    def was_told(self, thread: int, ino: int, node: int) -> bool:
        """Return whether the thread's last look-up returned `node` for `ino`."""
        walk = self._get(thread or -ino)
        return walk is not None and walk[0][3] == node

    def change(self, folder: int, name: bytes) -> None:
        """Note that this mount changed a name in the directory with inode `folder`."""
        self.changes += 1
        if len(self._changed) >= MANY:
            self._changed_before, self._changed = self._changed, {}
        self._changed[folder, name] = self.changes

    def is_changed(self, folder: int, step: Step) -> bool:
        """Return whether this mount changed the name of `step`, in directory `folder`, since then.

        False if the table no longer holds that change.
        """
        key = folder, step[1]
        last = self._changed.get(key) or self._changed_before.get(key, 0)
        return last > step[4]
