"""The commands and what they say of themselves."""

from __future__ import annotations

import click

from ivshmemfs.cli.main import SUBCOMMANDS, cli
from ivshmemfs.fsck.main import command as fsck
from ivshmemfs.manual import Manual
from mkfs.main import command as mkfs


def command_of(name: str) -> click.Command:
    """A command by the name that a shell knows, or a subcommand by its own."""
    context = click.Context(cli)
    found = {"mkfs.ivshmemfs": mkfs, "fsck.ivshmemfs": fsck, "ivshmemfs": cli}.get(name)
    found = found or cli.get_command(context, name)
    assert found is not None
    return found


NAMES = ["ivshmemfs", "mkfs.ivshmemfs", "fsck.ivshmemfs", *SUBCOMMANDS]


def manual(name: str) -> Manual:
    declared = command_of(name).manual  # type: ignore[attr-defined]
    assert isinstance(declared, Manual)
    return declared
