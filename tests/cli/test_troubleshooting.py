"""docs/troubleshooting.md quotes messages that the programs have, and commands that exist."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from ivshmemfs.cli.main import SUBCOMMANDS
from tests.support.mounts import TOP
from tests.support.roots import missing_beside, run_beside

PAGE = (TOP / "docs/troubleshooting.md").read_text()


def rows(first: str, last: str) -> list[list[str]]:
    """The cells of the tables between two headings."""
    part = PAGE.split(f"## {first}\n")[1].split(f"## {last}\n")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in cells if not row[0].startswith("message")]


def quoted(cell: str) -> list[str]:
    """The messages in the first cell of a row."""
    return [text for text in re.findall(r"`([^`]+)`", cell.split(" in `")[0]) if " " in text]


@cache
def literals() -> list[str]:
    """Every text in the sources and of errno; what is filled in is one ellipsis."""
    found = [os.strerror(number) for number in errno.errorcode]
    for folder in ("ivshmemfs", "mkfs"):
        for path in (TOP / folder).rglob("*.py"):
            for one in ast.walk(ast.parse(path.read_text())):
                if isinstance(one, ast.JoinedStr):
                    found.append("".join(_part(value) for value in one.values))
                elif isinstance(one, ast.Constant) and isinstance(one.value, str):
                    found.append(one.value)
    return found


def _part(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
        return {"FUSE_DEVICE": "/dev/fuse", "missing": "…"}.get(value.value.id, "…")
    return "…"


MESSAGES = [
    message
    for row in rows("Making a region", "Messages of other programs")
    for message in quoted(row[0])
]


def _known(message: str) -> bool:
    fixed = [part.strip() for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(re.escape(part) for part in fixed), re.DOTALL)
    return any(pattern.search(text) for text in literals())


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30
    assert not _known("no such … message is there")


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_programs_print(message: str) -> None:
    if "cannot be loaded" in message:
        message = message.replace("libfuse3", "…").replace("pyfuse3", "…")
    assert _known(message)


def test_each_row_says_what_to_do() -> None:
    for row in rows("Making a region", "Still stuck"):
        assert len(row) == 3, row
        assert row[2], row


def test_the_commands_exist() -> None:
    named = set(re.findall(r"`ivshmemfs ([a-z]+)", PAGE))
    assert named <= set(SUBCOMMANDS), named - set(SUBCOMMANDS)
    for program, options in (
        ("mkfs", r"mkfs\.ivshmemfs (--[a-z-]+)"),
        ("umount", r"umount (--\w+)"),
    ):
        words = [
            sys.executable,
            "-m",
            *([program] if program == "mkfs" else ["ivshmemfs", program]),
        ]
        shown = subprocess.run(
            [*words, "--help"], capture_output=True, text=True, check=True, cwd=TOP
        ).stdout
        for option in set(re.findall(options, PAGE)):
            assert option in shown


def test_the_links_lead_somewhere() -> None:
    """Within the two pages: sections that exist."""
    for page in (PAGE, (TOP / "docs/setup.md").read_text(), (TOP / "README.md").read_text()):
        for target, section in re.findall(
            r"\]\((?:docs/)?(setup|troubleshooting)\.md#?([^)]*)\)", page
        ):
            text = (TOP / f"docs/{target}.md").read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not section or section in anchors


@pytest.mark.skipif(bool(missing_beside()), reason=missing_beside())
def test_mount_8_without_its_helper() -> None:
    """What it says is quoted; a type without a helper replaces this one."""
    done = run_beside("mkdir /mnt/shared; mount -t ivshmemfsx label=hello /mnt/shared")
    said = done.stderr.replace("ivshmemfsx", "ivshmemfs").splitlines()[0]
    assert f"`{said}`" in PAGE
