"""What a `with` closes."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager: the end of a `with` calls `close`, which may be called again."""

    def close(self) -> None:
        """Let go of what is held; once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
