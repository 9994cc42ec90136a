"""Changes that callers ask for: none fails for lack of space that unused files take.

A change that finds no space makes room first (`Garbage.make_room`).  If that is too little, it
frees unused files: orphans that no peer holds open, and pins.  Freeing them is a change, too, but
one that makes no way for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from ivshmemfs.engine.committer import Committer
from ivshmemfs.engine.lifetimes import Lifetimes
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.errors import Busy, FsError, NoSpace

TRIES: Final = 8  # of one change; each frees FREED_FOR_SPACE orphans at most
T = TypeVar("T")


class Changes:
    """The changes of one mount that its callers ask for."""

    def __init__(self, committer: Committer, lifetimes: Lifetimes) -> None:
        self._committer: Final = committer
        self._lifetimes: Final = lifetimes

    def change(self, plan: Callable[[Transaction], T], *, removal: bool = False) -> T:
        """Do what `Committer.change` does, again while it finds no space and files are freed.

        It ends after TRIES: peers at work leave new orphans all the time.
        """
        for _ in range(TRIES):
            try:
                return self._committer.change(plan, removal=removal)
            except NoSpace as full:
                if not self._freed(full):
                    raise
        return self._committer.change(plan, removal=removal)

    def _freed(self, full: NoSpace) -> bool:
        """Free some unused files; whether there were any.  Raises Busy, Corrupt, EIO."""
        try:
            return self._lifetimes.make_way()
        except Busy:
            raise
        except FsError:  # the upkeep meets it, too, and tells of it
            raise full from None
