"""A write that finds too few free blocks: it is done in pieces, each in a commit of its own.

No write replaces contents in place.  So a piece needs free blocks for all its bytes until its
commit releases the blocks that it replaced.

    HALVING   no piece is stored; each NoSpace halves the next piece
    GOING ON  the first `done` bytes of the content are stored
    ENDED     all bytes are stored, or the next piece fails; the result is `done` unless it is 0

`turn` alone changes the state.  `done` only grows, and the size of a piece only shrinks.  No byte
is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ivshmemfs.engine.data import Buffer
from ivshmemfs.errors import Busy, IvshmemfsError, NoSpace, Unfinished

PIECES_AT_ONCE: Final = 8  # maximum commits of one turn, in about 5 ms


class Pieces:
    """The pieces of one write of `content` at `offset`; `store` writes one of them.

    An `appending` write ends after one piece: another writer may append between two pieces.
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
        self._kept = False  # whether `_rest` is a copy, which outlives the request's buffer
        self._size = self._half(len(content))  # of the next piece; the whole content did not fit
        self.done = 0

    def turn(self) -> int:
        """Store some pieces; returns how many bytes of the content are stored at the end.

        Raises Unfinished, whose `go_on` takes the next turn.  Raises Busy if this turn stored
        nothing; the caller can call it again.  Raises what `store` raises if no byte is stored.
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
        except IvshmemfsError:  # the next write of the caller raises it
            if not self.done:
                raise
            return self.done
        if not self._kept:
            self._rest, self._kept = memoryview(bytes(self._rest)), True
        raise Unfinished("a part is written", self.turn, self.done)

    def _store_next(self) -> None:
        """Store the next piece, halved until it fits; raises NoSpace if one block does not fit."""
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
        """Return about half of `length`; the piece ends at a block boundary if possible."""
        half = length // 2
        aligned = half - (self._at + half) % self._block_size
        return max(aligned, min(half, self._block_size), 1)
