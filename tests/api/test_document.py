"""docs/api.md: its code runs, in order, and its names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ivshmemfs
from ivshmemfs.api.fsspec_adapter import IvshmemFileSystem
from tests.support.mounts import TOP
from tests.support.regions import TestRegion

TEXT = (TOP / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_code_runs(made: TestRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 8
    names: dict[str, Any] = {}
    try:
        for number, block in enumerate(BLOCKS):
            code = block.replace("/dev/shm/hello", str(made.path))
            exec(compile(code, f"docs/api.md, block {number}", "exec"), names)
    finally:
        names["fs"].close()
        for instance in IvshmemFileSystem._cache.values():
            instance.client.close()
        IvshmemFileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["data-set.md", "messages.md", "shared-memory.md"])
def test_the_pages_on_uses(made: TestRegion, name: str) -> None:
    page = (TOP / "docs" / "uses" / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0].replace("/dev/shm/hello", str(made.path)), name, "exec"), {})


def test_the_methods_that_it_names_exist() -> None:
    section = TEXT[TEXT.index("## Names") : TEXT.index("## Locks")]
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", section)) - {"os", "pathlib", "shutil"}
    assert len(named) > 15
    assert not [name for name in named if not hasattr(ivshmemfs.Client, name)]


def test_every_public_method_of_the_client_is_named() -> None:
    public = {name for name in vars(ivshmemfs.Client) if not name.startswith("_")}
    internal = {
        "session",
        "context",
        "spec",
        "created_ns",
        "closed",
        "readonly",
        "unlink",
    }
    words = set(re.findall(r"\w+", TEXT))
    assert public - internal - words == set()
