"""`ivshmemfs`: finds the subcommand, and turns every error into one line and an exit code.

Exit codes are those of mount(8): 0 done, 1 wrong usage or permission, 2 system error, 4 internal
bug, 8 interrupted, 32 not mounted, 64 done but something was left out (`get`, `put`).

Two more ways to be called make it a mount helper: under a name that begins with `mount.` (a link
such as /sbin/mount.ivshmemfs), and with a region and a mount point but no subcommand, as mount.fuse
does for the type fuse.ivshmemfs in /etc/fstab.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from ivshmemfs import __version__, command
from ivshmemfs.printing import say

EXITS = command.Exits(usage=1, system=2, interrupted=8, internal=4, own=True)

#: Where each subcommand is; loaded when it is used, so that each starts as fast as it can.
SUBCOMMANDS = {
    "mount": "mount",
    "umount": "mount",
    "list": "info",
    "info": "info",
    "dump": "dump",
    "peers": "peers",
    "evict": "peers",
    "lock": "lock",
    "wait": "wait",
    "watch": "watch",
    "get": "transfer.commands",
    "put": "transfer.commands",
}


class Subcommands(click.Group):
    """A group whose members are loaded on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a session."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"ivshmemfs.cli.{SUBCOMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


def _show_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from ivshmemfs.engine import COMPILED

        kind = "compiled" if COMPILED else "pure Python"
        say(f"ivshmemfs, version {__version__} ({kind})")
        ctx.exit()


@click.command(
    cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def cli() -> None:
    """A filesystem in memory that several machines share.

    mkfs.ivshmemfs makes one, fsck.ivshmemfs checks it.
    """


def main(arguments: list[str] | None = None, prog_name: str | None = None) -> NoReturn:
    """Run the command; always leaves by SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = prog_name or os.path.basename(sys.argv[0])

    def run() -> int | None:
        result: int | None = cli.main(
            _as_mount_helper(name, words), prog_name="ivshmemfs", standalone_mode=False
        )
        return result

    sys.exit(command.run("ivshmemfs", run, EXITS))


def _as_mount_helper(name: str, words: list[str]) -> list[str]:
    """The same arguments with the subcommand that a mount helper means."""
    if name.startswith("mount."):
        return ["mount", "--as-helper", *words]
    if len(words) >= 2 and not words[0].startswith("-") and words[0] not in SUBCOMMANDS:
        second = words[1]
        if os.path.isabs(second):  # never looked at: its daemon may be stopped
            # mount.fuse adds suid and dev for root by itself, so they say nothing here.
            return ["mount", "--as-helper", "--drop-suid-dev", *words]
    return words
