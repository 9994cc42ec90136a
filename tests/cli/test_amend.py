"""`label`, `uuid`, `resize`: what they print, change and refuse."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from tests.cli.conftest import complains, ivshmemfs
from tests.support.checks import assert_sound
from tests.support.regions import TestRegion, get, put

MIB = 1 << 20


def said(*words: object) -> str:
    result = ivshmemfs(*words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.rstrip("\n")


def test_names_are_printed_and_changed(formatted: TestRegion) -> None:
    assert said("label", formatted.path) == ""
    assert said("label", formatted.path, "größer") == ""
    assert said("label", formatted.path) == "größer"
    first = said("uuid", formatted.path)
    assert said("uuid", formatted.path, "random") == said("uuid", formatted.path) != first
    wanted = str(uuid.uuid4())
    assert said("uuid", formatted.path, wanted) == wanted
    info = said("info", formatted.path)
    assert wanted in info
    assert "größer" in info


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("label", "{}", "x" * 65), "at most 64 bytes; this one has 65"),
        (("label", "{}", "\udcff"), "a label is UTF-8 text"),
        (("uuid", "{}", "one"), "'one' is not a UUID, nor the word random"),
        (("resize", "{}", "512K"), "nothing becomes smaller"),
        (("resize", "{}", "3M"), "QEMU refuses a device of 3 MiB; use 4M, or --any-size"),
        (("resize", "{}", "lots"), "lots"),
    ],
)
def test_wrong_wishes_change_nothing(
    words: tuple[str, ...], says: str, formatted: TestRegion
) -> None:
    before = formatted.path.read_bytes()
    complains(ivshmemfs(*(word.format(formatted.path) for word in words)), 1, says)
    assert formatted.path.read_bytes() == before


@pytest.mark.parametrize(("words"), [("label", "x"), ("uuid", "random"), ("resize", "2M")])
def test_a_mounted_region_is_refused(words: tuple[str, str], formatted: TestRegion) -> None:
    formatted.mount()
    result = ivshmemfs(words[0], formatted.path, words[1])
    complains(result, 1, f"in use by 1 peer(s): slot 1 (idle, pid {os.getpid()} on ")
    assert formatted.path.stat().st_size == MIB


def test_a_mounted_region_gets_names_by_force(formatted: TestRegion) -> None:
    fs = formatted.mount()
    assert said("label", "--force", formatted.path, "now") == ""
    put(fs, 1, b"a", b"it goes on")
    assert get(fs, 1, b"a") == b"it goes on"


def test_a_file_grows(formatted: TestRegion, tmp_path: Path) -> None:
    fs = formatted.mount()
    put(fs, 1, b"a", b"kept" * 9000)
    fs.unmount()
    path = formatted.path
    plan = f"{path}: would be 1 MiB -> 4 MiB, 4"
    assert said("resize", "-n", path, "4M").startswith(plan)
    assert path.stat().st_size == MIB
    assert said("resize", path, "4M").startswith(f"{path}: 1 MiB -> 4 MiB, 4")
    assert path.stat().st_size == 4 * MIB == path.stat().st_blocks * 512
    assert said("resize", path) == f"{path}: the filesystem has all of its 4 MiB already"
    assert said("resize", "-n", path).endswith(" already")
    fs = formatted.mount()
    assert get(fs, 1, b"a") == b"kept" * 9000
    put(fs, 1, b"b", bytes(MIB))
    assert_sound(formatted.region().memory)


def test_a_region_that_became_larger_says_what_to_type(formatted: TestRegion) -> None:
    os.truncate(formatted.path, 2 * MIB)
    complains(ivshmemfs("info", formatted.path), 32, "run 'ivshmemfs resize' on it")
    assert "2 MiB" in said("resize", formatted.path)
    assert "2 MiB" in said("info", formatted.path)


def test_what_does_not_fit_is_taken_back(formatted: TestRegion) -> None:
    size = os.statvfs(formatted.path).f_frsize * os.statvfs(formatted.path).f_blocks
    wanted = 1 << size.bit_length()
    complains(ivshmemfs("resize", formatted.path, f"{wanted >> 20}M"), 32, "do not fit there")
    assert formatted.path.stat().st_size == MIB
    assert "1 MiB" in said("info", formatted.path)
