"""Commands load only what they need: loading is most of the time that a short command takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ivshmemfs.cli.main import SUBCOMMANDS
from ivshmemfs.engine import COMPILED
from tests.support.regions import new_region

#: What takes long to load: the engine, and packages that only some commands use at some time.
HEAVY = (
    "asyncio", "http.client", "ivshmemfs.engine.filesystem", "pyfuse3", "rich", "trio", "xml.sax",
)  # fmt: skip
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


def test_the_version_loads_nothing_heavy() -> None:
    text, loaded = output_of("--version")
    assert text.endswith("(compiled)" if COMPILED else "(pure Python)")
    assert loaded == "LOADED"
