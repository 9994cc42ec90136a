"""What a command says of itself beside its options: sections, examples and exit codes.

`Command` prints examples and exit codes at the end of --help.  scripts/man writes all of it into
the manual pages, so both have one source.  Text is paragraphs between empty lines, as click has
it: a paragraph that begins with a line ``\\b`` keeps its lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import click


class Example(NamedTuple):
    """A command line, and what it does."""

    line: str
    purpose: str


class Manual(NamedTuple):
    """The hand-written part of a command's manual."""

    examples: tuple[Example, ...]
    exits: Mapping[int, str]
    #: Sections of the manual page alone, by title.
    sections: Mapping[str, str] = {}  # a field's default, never changed


class Command(click.Command):
    """A command whose --help ends with examples and exit codes."""

    def __init__(self, name: str | None, *, manual: Manual, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.manual = manual

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and exit codes."""
        write_end(self.manual, formatter)


def write_end(manual: Manual, formatter: click.HelpFormatter) -> None:
    """Write the examples and exit codes of `manual`."""
    with formatter.section("Examples"):
        for line, purpose in manual.examples:
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
            with formatter.indentation():
                formatter.write_text(purpose)
    with formatter.section("Exit codes"):
        formatter.write_dl([(str(code), text) for code, text in manual.exits.items()])
