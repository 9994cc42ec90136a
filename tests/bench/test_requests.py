"""Counting requests: what is read from the kernel's trace, and what counts as a difference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench import requests

LINE = (
    "  cp-12 [000] ..... 1.5: fuse_request_send: connection {} req 2 opcode {} ({}) len 48\n"
)  # fmt: skip


def test_the_requests_of_one_connection_are_counted(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text(
        "# tracer: nop\n"
        + LINE.format(51, 1, "FUSE_LOOKUP")
        + LINE.format(52, 1, "FUSE_LOOKUP")
        + LINE.format(51, 35, "FUSE_CREATE")
        + LINE.format(51, 1, "FUSE_LOOKUP")
    )
    assert requests.read(trace, 51) == Counter(LOOKUP=2, CREATE=1)


def test_a_trace_with_losses_is_no_count(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("CPU:1 [LOST 7 EVENTS]\n")
    with pytest.raises(RuntimeError, match="too small"):
        requests.read(trace, 51)


def test_differences_are_per_file_and_leave_noise_out() -> None:
    ours, theirs = Counter(LOOKUP=100, FLUSH=100), Counter(LOOKUP=99, READ=50)
    found = requests.differences("cp", ours, theirs, 100)
    assert found == {"cp: FLUSH": 1.0, "cp: READ": -0.5}
