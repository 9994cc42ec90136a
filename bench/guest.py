"""One QEMU guest with our file system, virtio-9p and virtiofs side by side, all over /dev/shm.

A process inside the guest serves ours, at the guest's speed.  Programs of the host serve the
others, at the host's.  With KVM both are the same.  Without it the guest is emulated, some thirty
times slower, and the figures say little about a machine with KVM.  The title of the table tells
which of the two it was.

Both others promise what ours does (mounted with `cache=none`): a change on one side is
seen by every later call on the other.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import build
from bench.peers import Peer, make_region
from bench.runner import PATIENCE, Sample, Table, interleave, parse
from bench.workloads import EMULATED, QUICK, QUICK_EMULATED, Scale, Workloads
from tests.guest.harness import (
    BIN,
    Guest,
    VirtmeRecipe,
    dies_with_parent,
    kvm_works,
    missing_parts,
)

GROUPS = ("look", "names", "random", "sequential", "readdir", "cp", "tree")
#: Where Debian 12's QEMU installs the server of virtiofs.
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
#: In the guest, which sees the host's files read-only.
TOP = Path("/run/bench")
#: virtio's transport carries no larger requests.
P9_OPTIONS = "trans=virtio,version=9p2000.L,cache=none,msize=512000"


def title() -> str:
    """Of the table, and whether what it shows was emulated."""
    return f"in a guest ({'KVM' if kvm_works() else 'emulated, without KVM'})"


def missing() -> str | None:
    """What is missing for a run, or None."""
    lacks = missing_parts()
    return f"{lacks}: run 'sh scripts/setup --guest'" if lacks else None


class GuestClient:
    """The measuring client, run in a guest."""

    def __init__(self, guest: Guest, program: Path) -> None:
        self._guest = guest
        self._program = program

    def run(self, folder: Path, *words: object) -> dict[str, Sample]:
        """Run one group in *folder* of the guest."""
        command = ["/usr/bin/env", "-C", str(folder), str(self._program), *map(str, words)]
        return parse(self._guest.run(*command, timeout=PATIENCE).check().out)

    def folder(self, path: Path, *, empty: bool = False) -> Path:
        """*path*, a folder of the guest that exists, perhaps newly made."""
        self._guest.sh(f"{f'rm -rf {path}; ' if empty else ''}mkdir -p {path}", PATIENCE)
        return path


def _compute(run: Callable[[list[str]], str]) -> float:
    """Seconds of a short computation in Python, the best of some."""
    code = "import timeit; print(min(timeit.repeat('sum(range(1000))', number=100, repeat=15)))"
    return float(run(["/usr/bin/python3", "-I", "-c", code]))


def measure(
    shm: Path, work: Path, *, quick: bool, rounds: int | None, on_run: Callable[[str], None]
) -> tuple[Table, dict[str, float]]:
    """Every group on every peer in one guest; *on_run* hears what is being done.

    The figures beside the table tell how much longer a computation takes in the guest.
    """
    scales = (Scale(), QUICK) if kvm_works() else (EMULATED, QUICK_EMULATED)
    scale = scales[quick]
    if rounds is not None:
        scale = Scale(**{**scale.__dict__, "rounds": rounds})
    table: Table = {}
    on_run("a guest is booting")
    with _guest(shm, work, scale) as (guest, found):
        program = TOP / "client"
        guest.sh(f"cp {build.client(work, static=True)} {program}")
        workloads = Workloads(GuestClient(guest, program), scale, TOP / "source")
        workloads.prepare(work / "source")
        guest.sh(f"cp -a {work / 'source'} {TOP}", PATIENCE)
        there = _compute(lambda command: guest.run(*command).check().out)
        here = _compute(lambda command: subprocess.check_output(command, text=True))
        names = " and ".join(peer.name for peer in found)
        for group in GROUPS:
            on_run(f"{title()}: {group} on {names}")
            interleave(found, scale.rounds, workloads.groups[group], table)
    return table, {"time of computing in Python, guest to host": there / here}


@contextmanager
def _guest(shm: Path, work: Path, scale: Scale) -> Iterator[tuple[Guest, list[Peer]]]:
    """A guest that has everything mounted, and the mounts."""
    region = make_region(shm / "guest.region", scale.region)
    shares = {name: shm / f"guest-{name}" for name in ("9p", "virtiofs")}
    for path in shares.values():
        path.mkdir()
    words = ["-virtfs", f"local,path={shares['9p']},mount_tag=bench9p,security_model=passthrough"]
    recipe = VirtmeRecipe(work)
    with ExitStack() as stack:
        if VIRTIOFSD.exists():
            words += stack.enter_context(_virtiofsd(shares["virtiofs"], work / "virtiofs.socket"))
        guest = Guest(recipe, "bench", [region], work, words, modest=False)
        stack.callback(guest.close)
        guest.start()
        guest.wait_ready()
        yield (
            guest,
            [
                _mount_ours(guest),
                _mount(guest, "9p", P9_OPTIONS, "bench9p"),
                *([_mount_virtiofs(guest, recipe)] if VIRTIOFSD.exists() else []),
            ],
        )


@contextmanager
def _virtiofsd(share: Path, socket: Path) -> Iterator[Sequence[str]]:
    """The server of virtiofs; yields the words for QEMU, which share the guest's memory with it."""
    command = [str(VIRTIOFSD), f"--socket-path={socket}", "-f"]
    server = subprocess.Popen(
        [*command, "-o", f"source={share},cache=none,xattr,log_level=err"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=dies_with_parent,
    )  # fmt: skip
    try:
        end = time.monotonic() + 20
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > end:
                said = server.communicate(timeout=5)[1] if server.poll() is not None else b""
                raise RuntimeError(f"virtiofsd did not start: {said.decode(errors='replace')}")
            time.sleep(0.05)
        yield [
            *(
                "-object",
                "memory-backend-memfd,id=ram,size=1G,share=on",
                "-numa",
                "node,memdev=ram",
            ),
            *("-chardev", f"socket,id=virtiofs,path={socket}"),
            *("-device", "vhost-user-fs-pci,chardev=virtiofs,tag=benchfs"),
        ]
    finally:
        server.kill()
        server.communicate()


def _mount_ours(guest: Guest) -> Peer:
    path = TOP / "ivshmemfs"
    guest.sh(f"mkdir -p {path}; {BIN / 'ivshmemfs'} mount {guest.device(0)} {path}")
    return Peer("ivshmemfs", path)


def _mount_virtiofs(guest: Guest, recipe: VirtmeRecipe) -> Peer:
    guest.sh(f"modprobe -d {recipe.modules} virtiofs")
    return _mount(guest, "virtiofs", "rw", "benchfs")


def _mount(guest: Guest, kind: str, options: str, tag: str) -> Peer:
    path = TOP / kind
    guest.sh(f"mkdir -p {path}; mount -n -t {kind} -o {options} {tag} {path}")
    return Peer(kind, path)
