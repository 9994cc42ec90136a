"""How text reaches a terminal or a log: one line at a time, and nothing in it can drive either.

Labels, host names, file names and link targets come from a region, and so from machines that are
not trusted.  Every command prints through `say`, and the daemon's log formats through `printable`.
"""

from __future__ import annotations

import sys

_ESCAPED_BYTES = range(0xDC80, 0xDD00)  # how os.fsdecode keeps a byte that is not UTF-8


def printable(text: str) -> str:
    """Return `text` with control, format and bidi characters, and line ends, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code in _ESCAPED_BYTES:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shown(raw: bytes) -> str:
    """Return bytes of a region, such as a label or a name, as printable text."""
    return printable(raw.decode(errors="surrogateescape"))


def say(line: str, *, err: bool = False) -> None:
    """Print one line to standard output, or to standard error."""
    try:
        import click  # the layers below need no more than `printable`
    except ImportError:  # which may be what the line is about
        print(printable(line), file=sys.stderr if err else sys.stdout, flush=True)
    else:
        click.echo(printable(line), err=err)
