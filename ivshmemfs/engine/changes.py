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
from ivshmemfs.errors import FsError, NoSpace

#: Most times that one change makes way: peers at work leave new orphans all the time.
WAYS: Final = 8
T = TypeVar("T")


class Changes:
    """The changes of one mount that its callers ask for."""

    def __init__(self, committer: Committer, lifetimes: Lifetimes) -> None:
        self._committer: Final = committer
        self._lifetimes: Final = lifetimes

    def change(self, plan: Callable[[Transaction], T], *, removal: bool = False) -> T:
        """Do what `Committer.change` does; while it finds no space, make way and do it again."""
        ways = WAYS
        while True:
            try:
                return self._committer.change(plan, removal=removal)
            except NoSpace:
                ways -= 1
                if ways < 0 or not self.make_way():
                    raise

    def make_way(self) -> bool:
        """Free some unused files; whether any went.  Raises Busy.

        Damage that it meets is left to the upkeep, which meets it too.
        """
        try:
            return self._lifetimes.make_way()
        except FsError:
            return False
