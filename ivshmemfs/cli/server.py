"""`server`: lets QEMU's ivshmem-doorbell devices have a region, with interrupts between guests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.command import complain, tell_systemd
from ivshmemfs.doorbell.messages import MOST_VECTORS
from ivshmemfs.errors import RegionSize, UsageError
from ivshmemfs.manual import Command, Example, Manual

MANUAL = Manual(
    examples=(
        Example(
            "ivshmemfs server /run/hello.sock /dev/shm/hello",
            "Serve a region. QEMU takes it with -chardev socket,path=/run/hello.sock,id=c "
            "-device ivshmem-doorbell,chardev=c,vectors=1 as its options.",
        ),
        Example(
            "ivshmemfs server --group libvirt-qemu /run/hello.sock label=hello",
            "Let the members of a group connect.",
        ),
    ),
    exits=exits({0: "ended by SIGTERM, SIGINT or SIGHUP"}),
)


def _mode(_ctx: click.Context, _option: click.Parameter, text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text!r} is not a mode such as 0660")
    return mode


@click.command("server", cls=Command, manual=MANUAL)
@click.argument("path", metavar="SOCKET", type=click.Path(path_type=Path))
@click.argument("region")
@click.option("-n", "--vectors", type=click.IntRange(1, MOST_VECTORS), default=1,
              show_default=True, help="Interrupts of each client, as QEMU has it.")  # fmt: skip
@click.option("--mode", default="0660", show_default=True, callback=_mode,
              help="Permissions of SOCKET.")  # fmt: skip
@click.option("--group", help="Group of SOCKET: the one that QEMU runs as.")
@click.option("--pidfile", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the process id to FILE while the server runs.")  # fmt: skip
def server_command(
    path: Path, region: str, vectors: int, mode: int, group: str | None, pidfile: Path | None
) -> int:
    """Serve REGION to QEMU's ivshmem-doorbell devices, on the Unix socket SOCKET.

    REGION is a file on the host, formatted or not. Each device has it as its memory, and can
    interrupt the others. Mounts and commands on this host become clients as well: then commits
    of any machine wake waiters. They find SOCKET if it is /run/ivshmemfs/NAME.sock for a file NAME.
    The server stays in the foreground until a signal ends it; then the
    devices keep the memory and each other, and no more can join. It is what QEMU's ivshmem-server
    is, which Debian does not ship.
    """
    import trio

    from ivshmemfs.doorbell.listening import listening, pid_file
    from ivshmemfs.doorbell.server import Server

    def note(line: str) -> None:
        complain("ivshmemfs", line)  # a standard error that is gone does not end the server

    with contextlib.ExitStack() as stack:
        memory, what = _opened(region)
        stack.callback(os.close, memory)
        listener = stack.enter_context(listening(path, mode, group))
        stack.enter_context(pid_file(pidfile))

        def ready() -> None:
            note(f"{path}: serving {what}, vectors={vectors}")
            tell_systemd()

        trio.run(Server(memory, vectors, note).run, listener, ready)
    return 0


def _opened(region: str) -> tuple[int, str]:
    """Return a descriptor of the region's file, and a description; raises a RegionError."""
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region, readable_size

    with open_region(region_of(region), identify=identify) as opened:
        if opened.kind != "file":
            raise UsageError(
                f"{opened.spec} is a {opened.kind}; a server needs the host's file, such as "
                "/dev/shm/NAME"
            )
        if opened.size & (opened.size - 1):
            raise RegionSize(
                f"{opened.spec}: QEMU refuses a device of {readable_size(opened.size)}; make a "
                "region whose size is a power of two: mkfs.ivshmemfs --size 64M"
            )
        what = f"{opened.spec}, {readable_size(opened.size)}"
        return os.open(opened.path, os.O_RDWR | os.O_CLOEXEC), what
