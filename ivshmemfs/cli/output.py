"""How commands print tables and JSON."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

from ivshmemfs.printing import printable, say

#: What --json does, in --help.
JSON_HELP = "Print JSON: one object a line."
WIDE = ("W", "F")  # East Asian widths that take two columns of a terminal


def width(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in WIDE else 1


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each of the rows, columns aligned; nothing trails the last one."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(_padded, row, widths)).rstrip() for row in cells]


def _padded(cell: str, columns: int) -> str:
    return cell + " " * (columns - width(cell))


def show_json(value: object) -> None:
    """Print a value as one line of JSON, in ASCII."""
    say(json.dumps(value))


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print the rows as a table."""
    for line in table(rows):
        say(line)
