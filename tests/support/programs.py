"""Programs that a test needs, and what to do when one is missing."""

from __future__ import annotations

import os
import shutil

import pytest

#: Set by scripts/test, which installs them all: then a missing program is a failure.
REQUIRED = os.environ.get("IVSHMEMFS_TEST_PROGRAMS") == "required"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin:/usr/games"


def find(program: str) -> str:
    """The path of a program; skips the test, or fails it, when it is not installed."""
    found = shutil.which(program, path=PATH)
    return found or missing(f"{program} is not installed: sh scripts/setup --programs")


def missing(reason: str) -> str:
    """Skip the test for this reason; fail it where everything should be installed."""
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)
