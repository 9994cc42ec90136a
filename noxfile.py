"""What people expect to find: `nox -l` lists the sessions, `nox -s quick` runs one.

Each session runs the project's own scripts in the environment that `sh scripts/setup` makes, so
nox itself makes none.
"""

from __future__ import annotations

import shutil

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "quick"]

PYTHON = ".venv/bin/python"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, the tables and manual pages that are generated, and the workflows."""
    session.run("sh", "scripts/setup", external=True)
    session.run(".venv/bin/ruff", "check", ".", external=True)
    session.run(".venv/bin/ruff", "format", "--check", ".", external=True)
    session.run(".venv/bin/mypy", external=True)
    session.run(PYTHON, "scripts/format-tables", "--check", external=True)
    session.run(PYTHON, "scripts/man", "--check", external=True)
    if shutil.which("actionlint"):
        session.run("actionlint", external=True)
    else:
        session.warn("actionlint is not installed: .github/workflows is not checked")


@nox.session
def quick(session: nox.Session) -> None:
    """Every test that is neither slow nor needs a guest."""
    session.run("sh", "scripts/test", "--quick", *session.posargs, external=True)


@nox.session
def test(session: nox.Session) -> None:
    """The whole test suite, guests included."""
    session.run("sh", "scripts/test", *session.posargs, external=True)


@nox.session
def coverage(session: nox.Session) -> None:
    """Line and branch coverage of the quick tests and of the processes that they start."""
    session.run("sh", "scripts/test", "--coverage", *session.posargs, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, side by side with tmpfs, memcpy and a filesystem in C."""
    session.run("sh", "scripts/setup", env={"IVSHMEMFS_COMPILE": "1"}, external=True)
    session.run(PYTHON, "-m", "bench", *session.posargs, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Write what is generated: the tables of docs/format.md, and the manual pages."""
    session.run("sh", "scripts/setup", external=True)
    session.run(PYTHON, "scripts/format-tables", external=True)
    session.run(PYTHON, "scripts/man", external=True)
