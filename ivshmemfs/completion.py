"""What the shell offers for a REGION when a user presses TAB.

A failure offers nothing: a message in the middle of a command line helps no one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
from click.shell_completion import CompletionItem

from ivshmemfs.format.superblock import identify
from ivshmemfs.region import discover, identified

Items = list[CompletionItem]
Complete = Callable[[click.Context, click.Parameter, str], Items]
#: Also files and directories, as the shell completes them.
FILES = CompletionItem("", type="file")


def quietly(names: Callable[[str], Iterator[str]], *more: CompletionItem) -> Complete:
    """Make a callback for click of a function that yields words that may begin as the user's."""

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
        try:
            words = list(dict.fromkeys(names(incomplete)))
        except Exception:
            words = []
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return [*found, *more]

    return complete


def regions(incomplete: str) -> Iterator[str]:
    """Yield the names of what is, or could be, a region; labels and UUIDs where they are meant."""
    candidates = discover()
    for candidate in candidates:
        yield candidate.spec
    if any(candidate.spec.startswith("pci:") for candidate in candidates):
        yield "pci"
    meant = [kind for kind in ("label", "uuid") if incomplete.startswith(f"{kind}=")]
    yield from () if meant else ("label=", "uuid=")
    if meant:
        for _candidate, (label, uuid) in identified(candidates, identify)[0]:
            name = label if meant == ["label"] else uuid
            if name:
                yield f"{meant[0]}={name}"


complete_region = quietly(regions, FILES)
