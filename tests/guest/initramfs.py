"""An initramfs with this machine's Python and the project in it, each file under its name here.

Guests over this machine's file tree (see harness.py) have it mounted by 9p, and QEMU does not save
the state of such a guest.  This one needs nothing but its own memory.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from tests.guest.harness import kernel_root

TOP = Path(__file__).resolve().parents[2]
PROGRAMS = ("fusermount3", "mount", "modprobe")
#: Large parts of Python that no command of the project uses.
WITHOUT = {"test", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "__pycache__"}


def _requirements(name: str, seen: set[str]) -> Iterator[str]:
    """The names of what is installed for a distribution, itself included."""
    if name in seen:
        return
    seen.add(name)
    yield name
    for line in distribution(name).requires or []:
        needed, _, condition = line.partition(";")
        if not re.search(r"extra|implementation_name|python_version < |os_name", condition):
            yield from _requirements(re.split(r"[^\w.-]", needed.strip())[0], seen)


def _installed() -> Iterator[Path]:
    """The files of the project and of what it needs."""
    for name in _requirements("ivshmemfs", set()):
        for file in distribution(name).files or []:
            yield Path(str(file.locate())).resolve()
    for part in ("ivshmemfs", "mkfs"):
        yield from (TOP / part).rglob("*")
    yield from Path(sysconfig.get_path("purelib")).glob("__editable__*")  # how they are found


def _wanted() -> Iterator[Path]:
    yield Path(sys.executable)
    yield Path(sys.prefix, "pyvenv.cfg")
    for place in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        yield from Path(place).rglob("*")
    yield from (Path(found) for name in PROGRAMS if (found := shutil.which(name)))


def _libraries(programs: list[Path]) -> Iterator[Path]:
    """The shared libraries that programs and extensions are linked with."""
    listed = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False
    ).stdout
    for path in set(re.findall(r"(/\S+) \(0x", listed)):
        yield Path(path)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _files() -> dict[str, Path]:
    """What goes in, by name; links are followed."""
    found: dict[str, Path] = {}
    for path in _wanted():
        if path.is_file() and not WITHOUT & set(path.parts) and "site-packages" not in str(path):
            found[str(path)] = path
    for path in _installed():
        if path.is_file():
            found[str(path)] = path
    programs = [path for path in found.values() if _is_elf(path)]
    found |= {str(path): path for path in _libraries(programs)}
    modules = next((kernel_root() / "lib/modules").iterdir())
    for path in modules.glob("modules.*"):
        found[f"/lib/modules/{modules.name}/{path.name}"] = path
    fuse = modules / "kernel/fs/fuse/fuse.ko"
    found[f"/lib/modules/{modules.name}/kernel/fs/fuse/fuse.ko"] = fuse
    return found


def write_initramfs(to: Path, init: Path) -> None:
    """Make the archive; `init` is its first process, a program of the Python that runs this."""
    from virtme.cpiowriter import CpioWriter  # installed with what the guests need

    files = _files()
    folders = {parent for name in files for parent in Path(name).parents}
    folders |= {Path("/", name) for name in ("proc", "sys", "dev", "run", "tmp", "mnt", "etc")}
    with to.open("wb") as file:
        archive = CpioWriter(file)
        for folder in sorted(folders - {Path("/")}):
            archive.mkdir(str(folder)[1:].encode(), 0o755)
        for name, path in sorted(files.items()):
            with path.open("rb") as body:
                mode = stat.S_IMODE(path.stat().st_mode)
                archive.write_file(name[1:].encode(), body, mode)
        script = f"#!{sys.executable}\n".encode() + init.read_bytes()
        archive.write_file(b"init", script, 0o755)
        archive.symlink(b"../proc/self/mounts", b"etc/mtab")
        archive.write_file(b"etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
        archive.write_trailer()
