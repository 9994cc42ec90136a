"""Imports point downwards only, as docs/protocol.md's table of layers says."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent

# Each layer may import itself and every layer after it.
LAYERS = ("cli", "fuse", "engine", "shm", "format", "region", "native", "printing", "errors")
SIDES = {
    "__main__": ("cli", "mkfs", "fsck", "command", "errors"),
    "api": ("doorbell", *LAYERS[1:]),
    "cli": ("command", "completion", "manual", "doorbell", *LAYERS[1:]),
    "doorbell": ("region", "native", "printing", "errors"),
    "completion": ("format", "region", "native", "printing", "errors"),
    "mkfs": ("command", "completion", "manual", *LAYERS[3:]),
    "fsck": ("command", "completion", "manual", *LAYERS[3:]),
    "manual": (),
    "command": ("printing", "errors"),
    "format": ("native", "printing", "errors"),  # no I/O: nothing of where the bytes come from
}


def _layer(path: Path) -> str:
    parts = path.relative_to(TOP).parts
    if parts[0] == "mkfs":
        return "mkfs"
    return parts[1].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _allowed(layer: str) -> tuple[str, ...]:
    if layer in SIDES:
        return (layer, *SIDES[layer])
    return LAYERS[LAYERS.index(layer) :]


# Outside of fuse/: the server of doorbell devices, and the command that runs it.
WAITING = (TOP / "ivshmemfs/doorbell/server.py", TOP / "ivshmemfs/cli/server.py")

SOURCES = sorted(
    path
    for folder in ("ivshmemfs", "mkfs")
    for path in (TOP / folder).rglob("*.py")
    if path != TOP / "ivshmemfs" / "__init__.py"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_imports_point_down(path: Path) -> None:
    allowed = _allowed(_layer(path))
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "mkfs":
            assert "mkfs" in allowed, f"{path} imports {name}"
        elif parts[0] == "ivshmemfs" and len(parts) > 1 and not parts[1].startswith("_"):
            assert parts[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_only_the_fuse_layer_knows_fuse_and_trio(path: Path) -> None:
    """The doorbell's server waits for clients, and so does trio; `cli/server.py` starts it."""
    if _layer(path) != "fuse":
        outside = {"pyfuse3", "trio"} & {name.split(".")[0] for name in _imports(path)}
        assert outside <= ({"trio"} if path in WAITING else set())


def test_the_api_takes_of_the_fuse_layer_only_the_list_of_mounts() -> None:
    taken = {name for path in SOURCES if _layer(path) == "api" for name in _imports(path)}
    fuse = {name for name in taken if name.startswith("ivshmemfs.fuse")}
    assert fuse == {"ivshmemfs.fuse", "ivshmemfs.fuse.mountpoint"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_no_async_below_the_fuse_layer(path: Path) -> None:
    if _layer(path) != "fuse" and path not in WAITING:
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not [n for n in nodes if isinstance(n, ast.AsyncFunctionDef | ast.Await)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_every_line_is_printed_by_say(path: Path) -> None:
    """`say` escapes what it prints, so nothing from a region reaches a terminal unescaped."""
    if path.name != "printing.py":
        nodes = ast.walk(ast.parse(path.read_text()))
        called = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
        assert not called & {"print", "click.echo", "click.secho", "echo", "sys.stdout.write"}
        assert not called & {"sys.stderr.write", "logging.Formatter"} or path.name == "logs.py"


FSCK = TOP / "ivshmemfs" / "fsck"
# Inside fsck each module may import itself and every module after it; `repair` is the package.
FSCK_ORDER = ("main", "repair", "check", "walk", "image", "invariants", "report")
REPAIR_ORDER = ("run", "trees", "writer", "slots", "names", "survey", "inodes")


def _modules_below(path: Path, package: str) -> set[str]:
    """The modules of `package` that a file imports."""
    parts = [name.removeprefix(f"{package}.").split(".")[0] for name in _imports(path)
             if name.startswith(f"{package}.")]  # fmt: skip
    return set(parts)


@pytest.mark.parametrize(
    ("folder", "package", "order"),
    [
        (FSCK, "ivshmemfs.fsck", FSCK_ORDER),
        (FSCK / "repair", "ivshmemfs.fsck.repair", REPAIR_ORDER),
    ],
    ids=["fsck", "repair"],
)
def test_the_modules_of_fsck_import_downwards(
    folder: Path, package: str, order: tuple[str, ...]
) -> None:
    """A check never needs a repair, and no part of a repair the one that uses it."""
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    names |= {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert names == set(order)
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        if name in order:
            above = set(order[: order.index(name)])
            assert not _modules_below(path, package) & above, f"{path} imports upwards"


def test_every_package_is_listed() -> None:
    """Setuptools takes only the packages that pyproject.toml lists."""
    listed = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(TOP).parts)
        for top in ("ivshmemfs", "mkfs")
        for path in (TOP / top).rglob("__init__.py")
    }
    assert set(listed) == found


NATIVE = TOP / "ivshmemfs" / "native"
INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', re.MULTILINE)
C_SOURCES = sorted([*NATIVE.glob("*.[ch]"), *(TOP / "tests" / "native").glob("*.[ch]")])


@pytest.mark.parametrize("path", C_SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_the_kernel_knows_no_python(path: Path) -> None:
    included = INCLUDE.findall(path.read_text())
    assert not [name for name in included if name in ("Python.h", "structmember.h")]
    own = [name for name in included if (path.parent / name).exists() or (NATIVE / name).exists()]
    ours = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
    assert set(ours) == set(own)  # what is in quotes is in this folder, or in native for a test


def test_no_c_source_is_elsewhere() -> None:
    found = (TOP / "ivshmemfs").rglob("*.[ch]")
    assert {path.parent for path in found} == {NATIVE}


def test_only_the_binding_knows_python_and_c() -> None:
    assert [path.name for path in NATIVE.glob("*.pyx")] == ["_native.pyx"]
    declared = (NATIVE / "_native.pxd").read_text()
    assert "Python.h" not in declared
    assert "cpython" not in declared


def test_the_binding_imports_no_layer() -> None:
    binding = (NATIVE / "_native.pyx").read_text() + (NATIVE / "_native.pyi").read_text()
    assert not re.findall(r"^\s*(?:from|import|cimport) ivshmemfs", binding, re.MULTILINE)


def test_what_is_compiled_can_be_read_where_only_build_requirements_are_installed() -> None:
    """mypyc reads the compiled layers and all that they import, with the settings of mypy.

    Of the FUSE layer some modules are compiled, and they import others.
    """
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["mypy"]
    ignored = {name for row in settings["overrides"] for name in row["module"]}
    below = LAYERS[LAYERS.index("fuse") :]
    for path in SOURCES:
        if _layer(path) in below:
            packages = {name.split(".")[0] for name in _imports(path)} - sys.stdlib_module_names
            missing = {f"{name}.*" for name in packages - {"ivshmemfs"}} - ignored
            assert not missing, f"{path} imports {missing}"
