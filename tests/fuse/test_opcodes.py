"""Every request that the kernel may send has a handler in both front ends, or a reason."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FrameType

import pyfuse3
import pytest

import ivshmemfs.fuse
from ivshmemfs.engine import ROOT_INO
from ivshmemfs.fuse import kernel_frontend, protocol
from ivshmemfs.fuse.budget import Budget
from ivshmemfs.fuse.pyfuse3_frontend import Pyfuse3FrontEnd
from tests.fuse.fake_kernel import Kernel

HEADER = Path("/usr/include/linux/fuse.h")
#: Those that a header may be too old for.
NEWER = {"STATX": 52, "COPY_FILE_RANGE_64": 53}

#: What the kernel never sends on this connection.
NEVER = {
    "BMAP": "only for block devices",
    "DESTROY": "only for block devices and virtiofs",
    "NOTIFY_REPLY": "nothing asks the kernel for what it caches",
    "SETUPMAPPING": "virtiofs alone",
    "REMOVEMAPPING": "virtiofs alone",
    "SYNCFS": "only for block devices and virtiofs",
}
#: What libfuse answers.
LIBFUSE = {
    "INIT": "before requests are read here",
    "IOCTL": "ENOSYS: files have no flags",
    "POLL": "ENOSYS, once: files are always readable and writable",
    "COPY_FILE_RANGE_64": "ENOSYS, once: the kernel goes on with COPY_FILE_RANGE",
}
NOT_ON_THE_DESCRIPTOR = {
    **LIBFUSE,
    "READDIRPLUS": "the answer to INIT refuses it: its attributes would be out of date at once",
}
NOT_THROUGH_PYFUSE3 = {
    **LIBFUSE,
    "INTERRUPT": "libfuse keeps it: what waits ends by itself",
    "READDIR": "pyfuse3 lists names with attributes only",
    "FALLOCATE": "pyfuse3 has no handler",
    "LSEEK": "pyfuse3 has no handler",
    "COPY_FILE_RANGE": "pyfuse3 has no handler",
    "TMPFILE": "pyfuse3 has no handler",
    "STATX": "pyfuse3 has no handler",
    "GETLK": "pyfuse3 has no handler, so FUSE_POSIX_LOCKS is not agreed on",
    "SETLK": "pyfuse3 has no handler, so FUSE_FLOCK_LOCKS is not agreed on either",
    "SETLKW": "pyfuse3 has no handler",
}
#: Requests whose handler in pyfuse3 has another name.
HANDLERS = {"RENAME2": "rename", "BATCH_FORGET": "forget", "READDIRPLUS": "readdir"}
#: Those without an answer, which have no handler on the descriptor but are done at once.
SILENT = {"FORGET", "BATCH_FORGET", "INTERRUPT"}


@pytest.fixture(scope="module")
def opcodes() -> dict[str, int]:
    """All that linux/fuse.h has."""
    if not HEADER.exists():
        pytest.skip(f"no {HEADER}")
    enum = HEADER.read_text().partition("enum fuse_opcode {")[2].partition("}")[0]
    found = re.findall(r"\sFUSE_([A-Z0-9_]+)\s*=\s*(\d+),", enum)
    known = {name: int(number) for name, number in found if "RESERVED" not in name}
    assert len(known) >= 40
    return known | NEWER


def test_the_numbers_are_the_kernels(opcodes: dict[str, int]) -> None:
    declared = {name: getattr(protocol, name) for name in opcodes if hasattr(protocol, name)}
    assert declared == {name: opcodes[name] for name in declared}


def test_every_request_on_the_descriptor(kernel: Kernel, opcodes: dict[str, int]) -> None:
    answered = {number for number, one in enumerate(kernel.front_end._handlers) if one is not None}
    handled = {name for name, number in opcodes.items() if number in answered} | SILENT
    assert handled == opcodes.keys() - NEVER.keys() - NOT_ON_THE_DESCRIPTOR.keys()


def test_every_request_through_pyfuse3(opcodes: dict[str, int]) -> None:
    handlers = {
        name for name in dir(Pyfuse3FrontEnd)
        if getattr(Pyfuse3FrontEnd, name) is not getattr(pyfuse3.Operations, name, None)
    }  # fmt: skip
    handled = {name for name in opcodes if HANDLERS.get(name, name.lower()) in handlers}
    named = {*NEVER, *NOT_THROUGH_PYFUSE3}
    assert handled - {"READDIR"} == opcodes.keys() - named
    # What pyfuse3 has no handler for today may get one: then it is to be handed on.
    lacks = {name for name, why in NOT_THROUGH_PYFUSE3.items() if "no handler" in why}
    assert not [name for name in lacks if hasattr(pyfuse3.Operations, name.lower())]


def test_both_front_ends_have_the_same_operations() -> None:
    """An operation that one of them does not call is one that pyfuse3 cannot hand over."""
    folder = Path(ivshmemfs.fuse.__file__).parent
    source = ast.parse((folder / "operations.py").read_text())  # a compiled class has more names
    classes = [one for one in source.body if isinstance(one, ast.ClassDef)]
    (operations,) = (one for one in classes if one.name == "Operations")
    names = {one.name for one in operations.body if isinstance(one, ast.FunctionDef)}
    public = {name for name in names if not name.startswith("_")}
    on_the_descriptor, through_pyfuse3 = (
        {name for name in public if re.search(rf'operations\.{name}\b|"{name}"', text)}
        for text in (
            (folder / f"{module}.py").read_text()
            for module in ("kernel_frontend", "pyfuse3_frontend")
        )
    )
    assert on_the_descriptor == public - {"readdirplus"}
    lacking = {
        "copy_file_range", "fallocate", "lseek", "opened", "readdir", "statx", "tmpfile"
    }  # fmt: skip
    lacking |= {"getlk", "setlk", "setlkw", "unlock", "locks", "share_locks"}
    assert through_pyfuse3 - {"readdir"} == public - lacking


# --- what a request costs ---------------------------------------------------------------------

COMPILED = not kernel_frontend.__file__.endswith(".py")
#: Python calls of a hot request, in this package and of named tuples.
CALLS = {
    "LOOKUP": 11, "GETATTR": 7, "OPEN": 8, "WRITE": 4, "READ": 4, "CREATE": 13, "UNLINK": 7,
    "RELEASE": 4,
}  # fmt: skip


@pytest.mark.skipif(COMPILED, reason="compiled functions do not tell of their calls")
def test_a_hot_request_makes_few_calls(kernel: Kernel) -> None:
    """A layer more would cost each of them about 5 %."""
    ino, handle = kernel.create(b"f")
    kernel.ask(protocol.LOOKUP, b"f\0")
    bodies = {
        "LOOKUP": b"f\0",
        "GETATTR": bytes(16),
        "OPEN": protocol.OPEN_IN.pack(0),
        "WRITE": protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc",
        "READ": protocol.READ_IN.pack(handle, 0, 3),
        "CREATE": protocol.CREATE_IN.pack(2, 0o644, 0) + b"g\0",
        "UNLINK": b"g\0",
        "RELEASE": protocol.RELEASE_IN.pack(handle),
    }
    in_folder = {"LOOKUP", "CREATE", "UNLINK"}
    counted = {
        name: _calls(kernel, getattr(protocol, name), body, ROOT_INO if name in in_folder else ino)
        for name, body in bodies.items()
    }
    assert counted.keys() == CALLS.keys()
    assert all(len(calls) <= CALLS[name] for name, calls in counted.items()), counted


def _calls(kernel: Kernel, opcode: int, body: bytes, node: int) -> list[str]:
    """The functions that answering a request calls."""
    calls: list[str] = []
    folder = str(Path(ivshmemfs.fuse.__file__).parent)

    def note(frame: FrameType, event: str, _argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith((folder, "<string")):
            calls.append(frame.f_code.co_name)

    kernel.push(opcode, body, node=node)
    budget = Budget()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        kernel.front_end.serve(budget, 0, 0)
    finally:
        sys.setprofile(before)
    assert kernel.answer()[0] == 0
    return calls
