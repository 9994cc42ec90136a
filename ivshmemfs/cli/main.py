"""`ivshmemfs`: finds the subcommand, and turns every error into one line and an exit code.

Exit codes are those of mount(8); `exits` lists them.

Under a name that begins with `mount.`, such as the link /sbin/mount.ivshmemfs, it is a mount
helper.  So it is with a region and a mount point but no subcommand.  mount.fuse calls it so, for
the type fuse.ivshmemfs in /etc/fstab.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, NoReturn

import click

from ivshmemfs import __version__, command
from ivshmemfs.cli.exits import COMMON
from ivshmemfs.manual import Example, Manual, write_end
from ivshmemfs.printing import say

EXITS = command.Exits(usage=1, system=2, interrupted=8, internal=4, own=True)


class Subcommand(NamedTuple):
    """Where a subcommand is, and what it does."""

    module: str
    summary: str


#: A subcommand is loaded when it is used.  `ivshmemfs --help` loads none, so it has the summaries.
SUBCOMMANDS = {
    "mount": Subcommand("mount", "Mount the filesystem on REGION."),
    "umount": Subcommand("mount", "Unmount MOUNTPOINT."),
    "list": Subcommand("info", "List regions, and where they are mounted."),
    "info": Subcommand("info", "Show what is on REGION and how full it is."),
    "label": Subcommand("amend", "Print or change the label of REGION."),
    "uuid": Subcommand("amend", "Print or change the UUID of REGION."),
    "resize": Subcommand("amend", "Make the filesystem on REGION larger; keep every file."),
    "dump": Subcommand("dump", "Show the bytes on REGION, field by field."),
    "peers": Subcommand("peers", "List the mounts of REGION on all machines."),
    "top": Subcommand("top", "Show what all machines do with REGION, again and again."),
    "metrics": Subcommand("metrics", "Print the state of regions for Prometheus."),
    "evict": Subcommand("peers", "Declare the peer in SLOT gone."),
    "lock": Subcommand("lock", "Run COMMAND under a lock between all machines."),
    "wait": Subcommand("wait", "Wait for a file to appear, go or change."),
    "watch": Subcommand("watch", "Print changes of files as they happen."),
    "send": Subcommand("queue", "Send records to other machines through a queue."),
    "receive": Subcommand("queue", "Wait for records of a queue."),
    "map": Subcommand("map", "Print where programs find a file as memory."),
    "get": Subcommand("transfer.commands", "Copy files from REGION, without a mount."),
    "put": Subcommand("transfer.commands", "Copy local files to REGION, without a mount."),
    "ls": Subcommand("files.show", "List files in a region, without a mount."),
    "cat": Subcommand("files.show", "Print files in a region, without a mount."),
    "du": Subcommand("files.show", "Show how much room files take in a region."),
    "df": Subcommand("files.show", "Show how full a region is."),
    "mkdir": Subcommand("files.change", "Make directories in a region."),
    "mv": Subcommand("files.change", "Move files within a region."),
    "rm": Subcommand("files.change", "Remove files from a region."),
    "server": Subcommand("server", "Serve REGION to QEMU's doorbell devices."),
    "doctor": Subcommand("doctor.commands", "Check a region and this machine; say what to type."),
}
MANUAL = Manual(
    examples=(
        Example("mkfs.ivshmemfs --size 64M /dev/shm/hello", "Make a region, on the host."),
        Example("ivshmemfs mount /dev/shm/hello /mnt/shared", "Mount it, on the host."),
        Example("ivshmemfs mount /mnt/shared", "Mount it, in a guest."),
    ),
    exits=COMMON,
)


class Subcommands(click.Group):
    """A group whose members are loaded on demand."""

    manual = MANUAL

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a session."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"ivshmemfs.cli.{SUBCOMMANDS[cmd_name].module}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries, and load nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.summary) for name, one in SUBCOMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and exit codes."""
        write_end(self.manual, formatter)


def _is_compiled() -> bool:
    """Whether the engine is compiled; like its `COMPILED`, but without loading it."""
    found = PathFinder.find_spec("filesystem", [str(Path(__file__).parents[1] / "engine")])
    return found is not None and not str(found.origin).endswith(".py")


def _show_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        kind = "compiled" if _is_compiled() else "pure Python"
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
        if words in (["-V"], ["--version"]):
            return ["--version"]
        return ["mount", "--as-helper", *words]
    if len(words) >= 2 and not words[0].startswith("-") and words[0] not in SUBCOMMANDS:
        second = words[1]
        if os.path.isabs(second):  # never looked at: its daemon may be stopped
            # mount.fuse adds suid and dev for root by itself, so they say nothing here.
            return ["mount", "--as-helper", "--drop-suid-dev", *words]
    return words
