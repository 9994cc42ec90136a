"""docs/protocol.md names the tests that show each rule: they exist, and rules are numbered."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
TEXT = (TOP / "docs/protocol.md").read_text()


def test_named_tests_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT))
    assert len(named) > 20
    missing = [
        f"{path}::{name}" for path, name in named if f"def {name}(" not in (TOP / path).read_text()
    ]
    assert not missing


def test_every_rule_has_a_number_and_a_test() -> None:
    rows = re.findall(r"^\| P(\d+) [^|]+\| (.+) \|$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert all("::" in tests for _, tests in rows)
