"""A write that finds less free room than it needs: pieces of it, each in a commit of its own.

Contents are never overwritten in place, so a piece needs free blocks for all that it brings, until
its commit releases what it replaced.

    HALVING   no piece was stored yet; each NoSpace halves the next one
    GOING ON  some were stored: `done` bytes of the content, from its start
    ENDED     all are stored, or the rest fails: `done` is the result, if it is not 0

`done` only grows, the size of a piece only shrinks.  Nothing that was stored is stored again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ivshmemfs.engine.data import Buffer
from ivshmemfs.errors import Busy, IvshmemfsError, NoSpace, Unfinished

PIECES_AT_ONCE: Final = 8  # commits of one turn, in about 5 ms


class Pieces:
    """The pieces of one write of `content` at `offset`; `store` writes one of them.

    At the end of a file (`appending`) one piece is all: another writer may come between two.
    """

    def __init__(
        self,
        store: Callable[[int, Buffer], None],
        offset: int,
        content: Buffer,
        block_size: int,
        *,
        appending: bool,
    ) -> None:
        self._store = store
        self._at = offset
        self._rest = memoryview(content)
        self._block_size = block_size
        self._appending = appending
        self._kept = False  # whether `_rest` is ours, and outlives the request
        self._size = self._half(len(content))  # of the next piece; the whole did not fit
        self.done = 0

    def turn(self) -> int:
        """Store some pieces; returns how many bytes of the content are stored in the end.

        Raises Unfinished, whose `go_on` takes the next turn; what `store` raises if nothing is
        stored; Busy if this turn stored nothing, and then another try goes on.
        """
        before = self.done
        try:
            for _ in range(PIECES_AT_ONCE):
                self._store_next()
                if not self._rest or self._appending:
                    return self.done
        except Busy:
            if self.done == before:
                raise
        except IvshmemfsError:  # the next write will tell the caller
            if not self.done:
                raise
            return self.done
        if not self._kept:
            self._rest, self._kept = memoryview(bytes(self._rest)), True
        raise Unfinished("a part is written", self.turn, self.done)

    def _store_next(self) -> None:
        """Store a piece that fits, the largest by halves; raises NoSpace if none does."""
        while True:
            piece = self._rest[: self._size]
            try:
                self._store(self._at, piece)
            except NoSpace:
                if len(piece) <= self._block_size:
                    raise
                self._size = self._half(len(piece))
                continue
            self.done += len(piece)
            self._at += len(piece)
            self._rest = self._rest[len(piece) :]
            return

    def _half(self, length: int) -> int:
        """About half of a piece, ending at a block boundary of the file where possible."""
        half = length // 2
        aligned = half - (self._at + half) % self._block_size
        return max(aligned, min(half, self._block_size), 1)
