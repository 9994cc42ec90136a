"""Fuzz one reader, guided by coverage (needs atheris: `sh scripts/setup --fuzz`).

    python -m tests.fuzz READER [--seconds N] [--keep]

What it finds is written to a file that libFuzzer names and raises as it was.  --keep puts the
shortest inputs that reached something new into the corpus of the repository, as many as fit.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from importlib import machinery
from pathlib import Path

from tests.fuzz import corpus


def sources_first() -> None:
    """Import the Python sources also of what is compiled: only they can be instrumented."""
    loaders = (
        (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    )
    sys.path_hooks.insert(0, machinery.FileFinder.path_hook(*loaders))
    sys.path_importer_cache.clear()


def fuzz(reader: str, words: list[str]) -> None:
    """Does not return."""
    import atheris

    sources_first()
    with atheris.instrument_imports(include=["ivshmemfs"]):
        read = importlib.import_module("tests.fuzz.readers").READERS[reader]
    read(b"")  # makes what is made once and kept
    atheris.Setup([sys.argv[0], *words], read)
    atheris.Fuzz()


def campaign(reader: str, seconds: int, keep: bool) -> int:
    """Fuzz in a process of its own for so long; its exit status."""
    from tests.fuzz.readers import seeds  # not before `fuzz` has arranged for instrumentation

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, data in enumerate(corpus.load(reader) + seeds(reader)):
            (folder / str(number)).write_bytes(data)
        command = [sys.executable, "-m", "tests.fuzz", "--inside", reader]
        limits = [
            "-timeout=10",
            "-rss_limit_mb=1500",
            "-max_len=1024",
            "-len_control=0",
            "-close_fd_mask=0",
        ]
        run = [*command, *limits, f"-max_total_time={seconds}", "-print_final_stats=1", str(folder)]
        status = subprocess.run(run, check=False).returncode
        if keep and not status:
            kept = corpus.save(reader, [path.read_bytes() for path in folder.iterdir()])
            print(f"{reader}: {kept} inputs kept")
    return status


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--inside"]:
        fuzz(words[1], words[2:])
    seconds = int(words[words.index("--seconds") + 1]) if "--seconds" in words else 60
    sys.exit(campaign(words[0], seconds, "--keep" in words))


if __name__ == "__main__":
    main()
