"""Commands load only what they need: loading is most of the time that a short command takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivshmemfs
from ivshmemfs.cli.main import SUBCOMMANDS
from ivshmemfs.engine import COMPILED
from tests.support.regions import TestRegion, new_region

#: What takes long to load: the engine, and packages that only some commands use at some time.
HEAVY = (
    "asyncio", "http.client", "ivshmemfs.engine.filesystem", "pyfuse3", "rich", "trio", "xml.sax",
)  # fmt: skip
#: What no command loads that mounts nothing, each for several milliseconds.
NEVER = (
    "asyncio", "_hashlib", "fsspec", "http.client", "ivshmemfs.doorbell.client",
    "ivshmemfs.doorbell.device", "lzma", "multiprocessing", "pyfuse3", "rich", "shutil", "trio",
    "xml.sax",
)  # fmt: skip
#: Modules of a command at most, when it has run.  click and what it needs are 120 of them.
MOST = 260
SUBMODULES = tuple(f"ivshmemfs.cli.{known.module}" for known in SUBCOMMANDS.values())
SCRIPT = f"""
import sys
sys.argv[1:] = {{words}}
try:
    from ivshmemfs.cli.main import main
    main()
finally:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    if "--version" in sys.argv or sys.argv[1:] == ["--help"]:
        heavy += [name for name in {SUBMODULES} if name in sys.modules]
    print("LOADED", *heavy)
"""


def output_of(*words: str) -> list[str]:
    """The lines that a command prints, and which modules of HEAVY it has loaded."""
    script = SCRIPT.replace("{words}", repr(list(words)))
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return ran.stdout.splitlines()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_loads_nothing_heavy(name: str) -> None:
    *text, loaded = output_of(name, "--help")
    assert text[0].startswith(f"Usage: ivshmemfs {name} ")
    assert loaded == "LOADED"


def test_the_help_of_all_loads_no_subcommand() -> None:
    *text, loaded = output_of("--help")
    shown = [line.split(maxsplit=1) for line in text]
    for name, known in SUBCOMMANDS.items():
        assert [name, known.summary] in shown
    assert loaded == "LOADED"


@pytest.mark.parametrize(
    "words",
    [
        ("label", "{}"), ("label", "{}", "new"), ("uuid", "{}", "random"), ("resize", "{}"),
        ("resize", "-n", "{}", "2M"), ("peers", "{}"), ("metrics", "{}"),
        ("top", "-n1", "-d0.1", "{}"), ("dump", "{}"), ("list",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_only_looks_at_tables_loads_no_engine(words: tuple[str, ...]) -> None:
    with new_region(1 << 20) as made:
        *_, loaded = output_of(*(word.format(made.path) for word in words))
    assert loaded == "LOADED"


COMMANDS = {
    "list": ("ivshmemfs.cli.main", "list"),
    "info": ("ivshmemfs.cli.main", "info", "{region}"),
    "put": ("ivshmemfs.cli.main", "put", "--force", "{region}", "{file}", "/there"),
    "get": ("ivshmemfs.cli.main", "get", "--force", "{region}", "/there", "{file}"),
    "ls": ("ivshmemfs.cli.main", "ls", "{region}:/"),
    "cat": ("ivshmemfs.cli.main", "cat", "{region}:/there"),
    "peers": ("ivshmemfs.cli.main", "peers", "{region}"),
    "wait": ("ivshmemfs.cli.main", "wait", "-t", "0", "{region}:/there"),
    "send": ("ivshmemfs.cli.main", "send", "{region}:/queue", "record"),
    "receive": ("ivshmemfs.cli.main", "receive", "-n", "1", "{region}:/queue"),
    "mkfs": ("mkfs.main", "--force", "-n", "{region}"),
    "fsck": ("ivshmemfs.fsck.main", "{region}"),
}


@pytest.fixture(scope="module")
def formatted() -> Iterator[TestRegion]:
    """A region with the file /there and a record in /queue."""
    with new_region(4 << 20) as made:
        with ivshmemfs.open(made.path) as fs:
            fs.write_bytes("/there", b"x")
            with fs.queue("/queue") as queue:
                queue.put(b"record")
        yield made


@pytest.mark.parametrize("name", COMMANDS)
def test_what_mounts_nothing_loads_little(name: str, formatted: TestRegion, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    module, *words = (word.format(region=formatted.path, file=file) for word in COMMANDS[name])
    script = (
        f"import sys; from {module} import main; sys.argv[1:] = {words}\n"
        "try: main()\n"
        f"finally: print('LOADED', len(sys.modules), *(set({NEVER}) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    _, count, *loaded = ran.stdout.splitlines()[-1].split()
    assert (loaded, int(count) <= MOST) == ([], True), count


def test_the_version_loads_nothing_heavy() -> None:
    text, loaded = output_of("--version")
    assert text.endswith("(compiled)" if COMPILED else "(pure Python)")
    assert loaded == "LOADED"
