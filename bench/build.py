"""Compiles the measuring client, and the C file system that is measured beside ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

#: Where libfuse3-dev installs its examples.
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
HERE = Path(__file__).parent


class BuildError(Exception):
    """Something cannot be compiled; the text says what is missing."""


def client(folder: Path, *, static: bool = False) -> Path:
    """Compile the measuring client into *folder*; *static* needs no libraries where it runs."""
    made = folder / ("client-static" if static else "client")
    _compile([str(HERE / "client.c"), "-o", str(made), *(["-static"] if static else [])])
    return made


def passthrough(folder: Path) -> Path | None:
    """Compile libfuse's passthrough_ll into *folder*; None where its source is not installed."""
    source = EXAMPLES / "passthrough_ll.c"
    if not source.exists():
        return None
    made = folder / "passthrough_ll"
    flags = _output(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    _compile([str(source), f"-I{EXAMPLES}", "-o", str(made), *flags])
    return made


def _compile(arguments: list[str]) -> None:
    _output(["cc", "-O2", "-w", *arguments])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {error.stderr.strip()}") from None
    return done.stdout
