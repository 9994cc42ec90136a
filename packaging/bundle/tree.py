"""Make the tree that the bundle carries: ivshmemfs, its Python, and every shared library of both.

    python tree.py PACKAGES TREE

PACKAGES is a directory as `pip install --target` fills it.  TREE is new:

    bin/NAME        shell scripts that start the commands; @DIR@ in them is replaced at installation
    commands/NAME   what these start, in Python
    python          the interpreter
    lib/            ld.so and all shared libraries
    lib/pythonX.Y/  the standard library, and the packages in site-packages
    share/          units, rules, licences

The programs use the carried ld.so and C library.  So the tree runs on any kernel of this
architecture, also where there is another C library, an older Python or none.
"""

from __future__ import annotations

import compileall
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import FishComplete, ZshComplete

TOP = Path(__file__).resolve().parents[2]
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
#: Parts of the standard library that no command uses.
WITHOUT = frozenset(
    (
        *("test", "tests", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "turtle.py"),
        *("pydoc_data", "distutils", "sqlite3", "curses", "dbm", "venv", "xmlrpc", "wsgiref"),
        *("__pycache__", "site-packages", "dist-packages", "_pyrepl", "unittest"),
    )
)
#: Extension modules that no command uses; several need large libraries.
WITHOUT_MODULES = re.compile(
    r"_tkinter|readline|_curses|_dbm|_gdbm|_sqlite3|nis|ossaudiodev|_test|_ctypes_test|xx|_codecs_"
)
COMMANDS = {
    "ivshmemfs": "ivshmemfs",
    "mkfs.ivshmemfs": "mkfs",
    "fsck.ivshmemfs": "fsck",
    "mount.ivshmemfs": "ivshmemfs",
    "mount.fuse.ivshmemfs": "ivshmemfs",
}
#: -I: nothing in the caller's environment or directory changes what is imported.
START = '#!/bin/sh\nexec "@DIR@/lib/ld.so" --argv0 "@DIR@/bin/python3" --library-path "@DIR@/lib" \\\n    "@DIR@/python" -I {words}"$@"\n'  # noqa: E501
COMMAND = """import sys
sys.path.append(f"{{sys.prefix}}/lib/{version}/site-packages")
from ivshmemfs.__main__ import {function}
{function}()
"""


def _ignored(directory: str, names: list[str]) -> set[str]:
    inside = Path(directory).name == "lib-dynload"
    return {
        name
        for name in names
        if name in WITHOUT
        or name.startswith("config-")
        or name.endswith(".a")
        or (inside and WITHOUT_MODULES.match(name))
    }


_unneeded = shutil.ignore_patterns("bin", "*.c", "*.h", "*.pyx", "*.pxd")


def is_elf(path: Path) -> bool:
    """Whether a file is a program or a shared library."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def libraries(programs: Iterable[Path]) -> Iterator[Path]:
    """The shared libraries that programs and extensions are linked with, ld.so among them."""
    listed = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False
    ).stdout
    if missing := re.findall(r"(\S+) => not found", listed):
        sys.exit(f"bundle: these libraries are missing here: {', '.join(sorted(set(missing)))}")
    for path in sorted(set(re.findall(r"(/\S+) \(0x", listed))):
        yield Path(path)


def copy_libraries(tree: Path) -> list[Path]:
    """Copy all shared libraries into the tree; return where they come from."""
    programs = [path for path in tree.rglob("*") if path.is_file() and is_elf(path)]
    copied = []
    found = list(libraries(programs))
    # glibc loads it by name when a thread ends by pthread_exit(3), and aborts without it.
    found += [path.with_name("libgcc_s.so.1") for path in found if path.name == "libc.so.6"]
    for path in found:
        name = "ld.so" if path.name.startswith("ld-") else path.name
        if path.name == "ld.so" or path.is_relative_to(tree):
            continue
        shutil.copyfile(path, tree / "lib" / name)
        copied.append(path)
    (tree / "lib/ld.so").chmod(0o755)
    return copied


def write_commands(tree: Path) -> None:
    """Write the start scripts and what they start."""
    (tree / "bin").mkdir()
    (tree / "commands").mkdir()
    starts = {name: f'-S "@DIR@/commands/{name}" ' for name in COMMANDS} | {"python3": ""}
    for name, words in starts.items():
        (tree / "bin" / name).write_text(START.format(words=words))
        (tree / "bin" / name).chmod(0o755)
    for name, function in COMMANDS.items():
        text = COMMAND.format(function=function, version=VERSION)
        (tree / "commands" / name).write_text(text)


def copy_licences(tree: Path, sources: Iterable[Path]) -> None:
    """Copy what Debian says about the licences of the files that the tree carries."""
    names = {str(path.resolve()) for path in sources} | {str(path) for path in sources}
    found = subprocess.run(["dpkg", "-S", *names], capture_output=True, text=True, check=False)
    (tree / "share/licences").mkdir(parents=True)
    for package in sorted({line.split(":")[0] for line in found.stdout.splitlines()}):
        text = Path("/usr/share/doc", package, "copyright")
        if text.exists():
            shutil.copyfile(text, tree / "share/licences" / package)


def write_completions(share: Path) -> None:
    """Write the files that make a shell complete the commands; zsh's and fish's are click's."""
    for place in ("bash-completion", "zsh", "fish"):
        (share / place).mkdir(parents=True)
    shutil.copyfile(TOP / "packaging/completion.bash", share / "bash-completion/ivshmemfs")
    for name in ("mkfs.ivshmemfs", "fsck.ivshmemfs"):
        (share / "bash-completion" / name).symlink_to("ivshmemfs")
    for name in ("ivshmemfs", "mkfs.ivshmemfs", "fsck.ivshmemfs"):
        variable = f"_{re.sub('[.-]', '_', name)}_COMPLETE".upper()
        anything = click.Command(name)
        for shell, place in ((ZshComplete, f"zsh/_{name}"), (FishComplete, f"fish/{name}.fish")):
            (share / place).write_text(shell(anything, {}, name, variable).source())


def precompile(tree: Path) -> None:
    """Write bytecode that is never checked against its source: the tree is not edited."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        tree / "lib", stripdir=str(tree), prependdir="/", quiet=2, invalidation_mode=mode, workers=0
    )


def make(packages: Path, tree: Path) -> None:
    """Make the tree."""
    standard = Path(sysconfig.get_path("stdlib"))
    target = tree / "lib" / VERSION
    shutil.copytree(standard, target, ignore=_ignored)
    interpreter = Path(sys.executable).resolve()
    shutil.copyfile(interpreter, tree / "python")
    (tree / "python").chmod(0o755)
    shutil.copytree(packages, target / "site-packages", ignore=_unneeded)
    carried = [interpreter, standard / "os.py", *copy_libraries(tree)]
    write_commands(tree)
    copy_licences(tree, carried)
    for page in (TOP / "docs/man").iterdir():
        folder = tree / "share/man" / f"man{page.suffix[1:]}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, folder / page.name)
    for part in ("systemd", "tmpfiles.d", "udev"):
        shutil.copytree(TOP / "packaging" / part, tree / "share" / part)
    write_completions(tree / "share")
    precompile(tree)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
