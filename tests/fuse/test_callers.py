"""What can be found out about a thread that asks."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from ivshmemfs.fuse import callers, options
from ivshmemfs.fuse.callers import CAP_DAC_OVERRIDE, can_tell, capabilities, is_capable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="is about root's capabilities")
GONE = 2**22 + 1  # more than any process has for a number


def in_child(body: str) -> str:
    """What a function of this module finds about a child that has done something first."""
    receiving, sending = os.pipe()
    release, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.unshare(0x10000000) if body == "leave" else 0
        os.write(sending, b"y" if done == 0 else b"n")
        os.close(go)
        os.read(release, 1)
        os._exit(0)
    assert os.read(receiving, 1) == b"y"
    found = f"{capabilities(pid) >> CAP_DAC_OVERRIDE & 1} {is_capable(pid, CAP_DAC_OVERRIDE)}"
    for fd in (release, go, receiving, sending):
        os.close(fd)
    os.waitpid(pid, 0)
    return found


def test_of_whom_it_can_be_told() -> None:
    assert can_tell()
    assert is_capable(os.getpid(), CAP_DAC_OVERRIDE)
    assert not is_capable(0, CAP_DAC_OVERRIDE)  # a thread of another pid namespace
    assert not is_capable(GONE, CAP_DAC_OVERRIDE)
    assert capabilities(GONE) == 0


def test_capabilities_count_in_their_user_namespace() -> None:
    assert in_child("stay") == "1 True"
    assert in_child("leave") == "1 False"


def test_a_thread_is_asked_about_by_itself() -> None:
    found: list[bool] = []

    def give_up() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capset(header, sets) == 0
        found.append(is_capable(threading.get_native_id(), CAP_DAC_OVERRIDE))

    thread = threading.Thread(target=give_up)
    thread.start()
    thread.join()
    assert found == [False]
    assert is_capable(os.getpid(), CAP_DAC_OVERRIDE)


def test_a_proc_of_another_pid_namespace_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "readlink", lambda _path: "1")
    assert not can_tell()


def test_the_kernel_checks_where_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def words() -> list[str]:
        return options.fusermount_options(options.parse([]), "region").split(",")

    assert "default_permissions" not in words()
    monkeypatch.setattr(callers, "can_tell", lambda: False)
    assert "default_permissions" in words()
    assert not options.parse([]).root_only
