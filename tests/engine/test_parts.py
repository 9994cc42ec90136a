"""The parts of `Filesystem` use only the parts before them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ivshmemfs.engine import __file__ as package

PARTS = (
    "volume", "openfiles", "garbage", "committer", "orphans", "lifetimes", "changes", "upkeep",
    "filesystem",
)  # fmt: skip


def parts_in(name: str) -> set[str]:
    """The parts that a module of the engine imports."""
    tree = ast.parse((Path(package).parent / f"{name}.py").read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {module.removeprefix("ivshmemfs.engine.") for module in modules} & set(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_uses_only_parts_before_it(name: str) -> None:
    assert parts_in(name) <= set(PARTS[: PARTS.index(name)])


def test_every_part_is_used() -> None:
    assert parts_in("filesystem") == set(PARTS[:-1])


@pytest.mark.parametrize("name", ["collect", "dropped", "credentials", "handle", "pieces"])
def test_what_the_parts_are_made_of_uses_none_of_them(name: str) -> None:
    assert not parts_in(name)


def test_locks_look_and_change_and_use_nothing_else() -> None:
    assert parts_in("locks") == {"volume", "changes"}
