"""Options, and the figures of campaigns, which are printed after everything else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TOP = Path(__file__).resolve().parent.parent

# Assertions in modules that tests share explain themselves, too; before any of them is imported.
pytest.register_assert_rewrite(
    *(f"tests.{path.name}" for path in (TOP / "tests").iterdir() if path.is_dir())
)

from tests.support.figures import Figures  # noqa: E402

# How long an example takes says nothing on a machine that does other things as well.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
