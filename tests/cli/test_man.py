"""The manual pages are those that the help gives, and every help has an example."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ivshmemfs.cli.main import SUBCOMMANDS, cli
from ivshmemfs.fsck.main import command as fsck
from mkfs.main import command as mkfs

TOP = Path(__file__).parent.parent.parent
PAGES = sorted((TOP / "docs" / "man").glob("*.[58]"))


def commands() -> dict[str, click.Command]:
    """Every command, by the words that call it."""
    context = click.Context(cli)
    found = {f"ivshmemfs {name}": cli.get_command(context, name) for name in SUBCOMMANDS}
    return {"mkfs.ivshmemfs": mkfs, "fsck.ivshmemfs": fsck, **{k: v for k, v in found.items() if v}}


def test_the_pages_are_what_the_help_gives() -> None:
    result = subprocess.run(
        [sys.executable, TOP / "scripts" / "man", "--check"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_there_is_a_page_for_each_program_and_for_the_filesystem() -> None:
    assert [page.name for page in PAGES] == [
        "fsck.ivshmemfs.8", "ivshmemfs.5", "ivshmemfs.8", "mkfs.ivshmemfs.8", "mount.ivshmemfs.8",
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_a_page_renders_without_a_warning(page: Path) -> None:
    result = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", page],
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert "SYNOPSIS" in result.stdout or page.suffix == ".5"


@pytest.mark.parametrize("name", commands())
def test_every_help_has_an_example_that_begins_with_its_command(name: str) -> None:
    text = commands()[name].help or ""
    _, found, example = text.partition("Example:\n")
    assert found, text
    assert example.strip().startswith(name), example
