"""Rules for the source itself: what tests import, and the names in docstrings of the package."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

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


# --- names in docstrings ----------------------------------------------------------------------

PACKAGE = TESTS.parent / "ivshmemfs"
SOURCES = sorted(PACKAGE.rglob("*.py*"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES if path.suffix in (".py", ".pyi")}
IN_BACKTICKS = re.compile(r"`([A-Za-z_][\w.]*\w)(?:\(\))?`")
CAMEL_CASE = re.compile(r"_?[A-Z]\w*[a-z]\w*")
COMMANDS = set(tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["scripts"])


def _defined(body: list[ast.stmt]) -> set[str]:
    """Names that the statements of a module or a class define or import."""
    found = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.alias):
                found.add(node.asname or node.name)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
    return found


def _members(cls: ast.ClassDef) -> set[str]:
    """Methods, fields and attributes of a class, without those of its bases."""
    own = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return own | _defined(cls.body)


def _classes() -> dict[str, set[str]]:
    """The members of every class, with those of its bases in the package."""
    found = [node for t in TREES.values() for node in ast.walk(t) if isinstance(node, ast.ClassDef)]
    members: dict[str, set[str]] = {}
    for cls in found:
        members.setdefault(cls.name, set()).update(_members(cls))
    for _ in found:  # enough rounds for every depth of inheritance
        before = sum(map(len, members.values()))
        for cls in found:
            for base in cls.bases:
                members[cls.name] |= members.get(ast.unparse(base).split(".")[-1], set())
        if sum(map(len, members.values())) == before:
            break
    return members


CLASSES = _classes()
BY_MODULE: dict[str, set[str]] = {}
for _path, _tree in TREES.items():
    _stem = _path.parent.name if _path.stem == "__init__" else _path.stem
    BY_MODULE.setdefault(_stem, set()).update(_defined(_tree.body))
TOP = set().union(*BY_MODULE.values())
# Chains of attributes in the code, such as "view.nodes", and each of them without `self`.
CHAINS = {
    ast.unparse(node).removeprefix("self.")
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
}
ATTRIBUTES = {chain.split(".")[-1] for chain in CHAINS}
# Names in backticks that no code has, with the reason.
NOT_IN_CODE = {
    "PATH",  # a part of what the user gives
    "resource2",  # files of sysfs, whose names the code puts together
    "resource2_wc",
}


def _words() -> Iterator[str]:
    """Every identifier of the code, and every string that looks like one (options, file names)."""
    for path, tree in TREES.items():
        yield from (path.stem, path.parent.name)
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
                    yield word
                case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                    yield word
                case ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                    yield word
                case ast.alias(name=word, asname=other):
                    yield from (*word.split("."), other or word)


WORDS = set(_words())


def _resolves(name: str) -> bool:
    """Whether a class, a module with such a name in it, or other code has `name`."""
    first, *rest = name.split(".")
    if not rest and CAMEL_CASE.fullmatch(first):
        return first in CLASSES or first in TOP or first in ATTRIBUTES or hasattr(builtins, first)
    if not rest:
        return first in WORDS or first in NOT_IN_CODE or keyword.iskeyword(first)
    if name in CHAINS or name in COMMANDS:
        return True
    if first in CLASSES:
        return rest[0] in CLASSES[first]
    if rest[0] not in BY_MODULE.get(first, ()):
        return False
    return len(rest) == 1 or _resolves(".".join(rest))


def _in_docstrings() -> Iterator[tuple[str, str]]:
    """(where, name) of each name in backticks."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for name in IN_BACKTICKS.findall(ast.get_docstring(node) or ""):
                    yield f"{path.relative_to(PACKAGE)} {getattr(node, 'name', '')}", name


def test_names_in_docstrings_exist() -> None:
    """A reader that follows a name in backticks finds it in the package."""
    named = list(_in_docstrings())
    assert len(named) > 300, "the search finds names at all"
    assert not [f"{where}: `{name}`" for where, name in named if not _resolves(name)]


@pytest.mark.parametrize(
    ("name", "exists"),
    [
        ("Transaction", True),
        ("Transaction.put", True),
        ("Transaction.inode", True),  # inherited from View
        ("Transaction.publish", False),
        ("directory.leaf_after", True),
        ("directory.leaf_before", False),
        ("NoSuchClass", False),
        ("mkfs.ivshmemfs", True),
        ("ValueError", True),
        ("leaf_after", True),
        ("leaf_before", False),
    ],
)
def test_what_counts_as_a_name(name: str, exists: bool) -> None:
    assert _resolves(name) is exists
