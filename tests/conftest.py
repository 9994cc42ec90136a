"""Options, the division of a parallel run, and the figures of campaigns, printed at the end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TOP = Path(__file__).resolve().parent.parent

# How long an example takes says nothing on a machine that does other things as well.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


class Figures:
    """What campaigns did, for the end of the run."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts: dict[str, tuple[int, set[str]]] = {}

    def add(self, line: str) -> None:
        self._lines.append(line)

    def count(self, campaign: str, points: int, part: str) -> None:
        """So many `points` more in a campaign; `part` is the operation or seed they belong to."""
        before, parts = self._counts.get(campaign, (0, set()))
        self._counts[campaign] = (before + points, parts | {part})

    def merge(self, lines: list[str], counts: dict[str, tuple[int, list[str]]]) -> None:
        """Add what another process of a parallel run collected."""
        self._lines += lines
        for campaign, (points, parts) in counts.items():
            before, known = self._counts.get(campaign, (0, set()))
            self._counts[campaign] = (before + points, known.union(parts))

    def parts(self) -> dict[str, object]:
        """The same as plain objects, which can be sent to the process that prints them."""
        counts = {name: (points, sorted(parts)) for name, (points, parts) in self._counts.items()}
        return {"lines": self._lines, "counts": counts}

    def lines(self) -> list[str]:
        counted = [
            f"{campaign}: {points:,} points of {len(parts)} workloads"
            for campaign, (points, parts) in self._counts.items()
        ]
        return counted + self._lines


_FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        default=os.environ.get("IVSHMEMFS_TEST_LONG", "") not in ("", "0"),
        help="full counts of all campaigns (minutes to hours) instead of their short forms",
    )
    parser.addoption(
        "--case",
        default=None,
        help="run this one case of a campaign, as a failing campaign prints it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if any((TOP / "ivshmemfs").glob("_compiled*.so")):  # which would run in place of their sources
        checked = subprocess.run(["sh", TOP / "scripts/setup", "--check"], check=False, timeout=60)
        if checked.returncode:
            raise pytest.UsageError(
                "the compiled modules are older than their sources: run `sh scripts/setup`, "
                "or `IVSHMEMFS_COMPILE=0 sh scripts/setup` to work on them uncompiled"
            )
    config.stash[_FIGURES] = Figures()


def _group(item: pytest.Item) -> str:
    """Tests of one group run in one process: all guests, which are booted once, or a module."""
    return "guest" if "guest" in item.keywords else item.nodeid.partition("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="runs with --long only"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of a parallel run has ended: take over its figures."""
    sent = getattr(node, "workeroutput", {}).get("figures")
    if sent:
        node.config.stash[_FIGURES].merge(**sent)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["figures"] = session.config.stash[_FIGURES].parts()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash[_FIGURES].lines()
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    return request.config.stash[_FIGURES]


@pytest.fixture(scope="session")
def long_run(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def only_case(request: pytest.FixtureRequest) -> str | None:
    case = request.config.getoption("--case")
    return str(case) if case is not None else None
