"""Rules for the tests themselves: what one module takes from another."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parent
MODULES = sorted(TESTS.rglob("*.py"))
SHARED = "support"


def _imported(path: Path) -> set[str]:
    """Names of modules of the tests, and of what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tests"}


IMPORTED = {str(path.relative_to(TESTS)): _imported(path) for path in MODULES}


def test_no_test_is_imported() -> None:
    """A module that others import has no tests, so its name does not begin with test_."""
    wrong = [
        f"{path} imports {name}"
        for path, names in IMPORTED.items()
        for name in sorted(names)
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert not wrong


def test_folders_share_only_what_is_in_support() -> None:
    wrong = [
        f"{path} reaches into {name}"
        for path, names in IMPORTED.items()
        for name in sorted(names)
        if name.split(".")[1] not in (path.split("/")[0], SHARED)
    ]
    assert not wrong


def test_support_has_no_tests() -> None:
    assert not list((TESTS / SHARED).rglob("test_*.py"))
