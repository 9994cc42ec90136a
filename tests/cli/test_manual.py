"""--help and the manual pages: examples that can be typed, exit codes, pages without warnings."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest

from ivshmemfs import __version__
from ivshmemfs.cli.main import SUBCOMMANDS, cli
from ivshmemfs.engine import COMPILED
from tests.cli.manuals import NAMES, command_of, manual
from tests.support.mounts import TOP, run
from tests.support.programs import find

PAGES = sorted((TOP / "docs" / "man").iterdir())
SHELL = {"&&", "|", ";"}  # words that end a command


def ours(line: str) -> list[list[str]]:
    """The commands of ours in a line of a shell, each as its words."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line):
        if word in SHELL:
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if "ivshmemfs" in words[0]]


@pytest.mark.parametrize("name", NAMES)
def test_examples_can_be_typed(name: str) -> None:
    assert manual(name).examples
    for line, purpose in manual(name).examples:
        assert purpose.endswith("."), line
        found = ours(line)
        assert found, f"{line}: no command of ours in it"
        for program, *words in found:
            command = command_of(program)
            if program == "ivshmemfs":
                command = command_of(words.pop(0))
            command.make_context(program, words)  # raises UsageError


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_examples_and_exit_codes(name: str) -> None:
    command = command_of(name)
    text = command.get_help(click.Context(command, info_name=name, max_content_width=80))
    _, examples, exits = re.split(r"\n(?:Examples|Exit codes):\n", text)
    for line, _purpose in manual(name).examples:
        assert f"  {line}\n" in examples
    codes = [int(code) for code in re.findall(r"^  (\d+) ", exits, re.MULTILINE)]
    assert codes == sorted(manual(name).exits)
    assert 0 in codes


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_terminal(name: str) -> None:
    command = command_of(name)
    text = command.get_help(click.Context(command, info_name=name, max_content_width=80))
    assert not [line for line in text.splitlines() if len(line) > 80]


def test_summaries_are_those_of_the_commands() -> None:
    """`ivshmemfs --help` loads no subcommand, so it has summaries of its own."""
    text = cli.get_help(click.Context(cli, info_name="ivshmemfs"))
    for name, (_module, summary) in SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)
        verb = (command_of(name).help or "").split()[0]
        assert summary.split()[0] == verb, name


def test_help_loads_no_subcommand() -> None:
    code = (
        "import sys\nfrom ivshmemfs.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)\n"
    )
    loaded = set(run(sys.executable, "-c", code).stderr.split())
    assert "ivshmemfs.cli.main" in loaded
    assert not {name for name in loaded if re.match(r"ivshmemfs\.(engine|fuse|region|shm)", name)}


def test_version_tells_what_the_engine_is() -> None:
    kind = "compiled" if COMPILED else "pure Python"
    result = run(sys.executable, "-m", "ivshmemfs", "--version")
    assert result.stdout == f"ivshmemfs, version {__version__} ({kind})\n"


@pytest.mark.parametrize("words", [["--help"], ["/none:/x", "-", "-"], ["/none", "a", "b"]])
def test_get_loads_the_engine_only_for_a_region(words: list[str]) -> None:
    code = (
        "import sys\nfrom ivshmemfs.cli.main import main\n"
        f"try: main(['get', *{words!r}])\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)\n"
    )
    loaded = set(run(sys.executable, "-c", code).stderr.split())
    assert "ivshmemfs.cli.transfer.commands" in loaded
    assert not {name for name in loaded if name.startswith("ivshmemfs.engine")}


# --- the pages --------------------------------------------------------------------------------


def test_the_pages_say_what_the_commands_declare() -> None:
    result = run(sys.executable, TOP / "scripts" / "man", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_command_has_a_page() -> None:
    scripts = metadata.entry_points(group="console_scripts")
    names = {script.name for script in scripts if "ivshmemfs" in script.name}
    documented = {path.name for path in PAGES}
    for name in names - {"mount.fuse.ivshmemfs"}:  # mount.ivshmemfs(8) tells of it
        assert f"{name}.8" in documented
    assert "ivshmemfs.5" in documented


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_renders_without_warnings(path: Path) -> None:
    done = subprocess.run(
        [find("groff"), "-man", "-ww", "-Tutf8", path], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)
    assert re.search(r"^NAME$", text, re.MULTILINE)
    if path.suffix == ".8":
        assert re.search(r"^EXIT STATUS$", text, re.MULTILINE)


def test_a_wheel_carries_the_pages() -> None:
    code = (
        "from distutils.core import run_setup\n"
        "for folder, files in run_setup('setup.py', stop_after='config').data_files:\n"
        "    print(folder, *files)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools\n{code}"], capture_output=True, text=True,
        check=False, cwd=TOP, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in PAGES:
        line = next(line for line in done.stdout.splitlines() if f"docs/man/{path.name}" in line)
        assert line.startswith(f"share/man/man{path.suffix[1:]} ")
