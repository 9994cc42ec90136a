"""Tables of cases, each made on a tmpfs and on a mount: the outcomes must be the same."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Figures
from tests.posix import tables
from tests.posix.lab import Lab, needs_fuse, needs_root
from tests.posix.twin import Case, Place, Twins

pytestmark = [needs_fuse, needs_root]

#: Cases that are made and looked at together.
TOGETHER = 400

TABLES: dict[str, Callable[[], Iterator[Case]]] = {
    **{f"operations, {where}": partial(tables.operations, where) for where in tables.FOLDERS},
    "opening": tables.opening,
    "every mode": tables.every_mode,
    "modes of directories": tables.modes_of_directories,
    "changing modes": tables.changing_modes,
    "changing owners": tables.changing_owners,
    "shedding": tables.shedding,
    "creating": tables.creating,
    "setting times": tables.setting_times,
    "renaming": tables.renaming,
    "renaming relatives": tables.renaming_relatives,
    "sticky": tables.sticky,
    "shapes of paths": tables.shapes,
    "chains": tables.chains,
}


@pytest.fixture(scope="module")
def twins(lab: Lab) -> Iterator[Twins]:
    """A tmpfs that leaves access times alone, and two mounts of a region."""
    with tempfile.TemporaryDirectory(prefix="ivshmemfs-twin-") as folder:
        words = ["mount", "-t", "tmpfs", "-o", "noatime,mode=0777", "twin", folder]
        subprocess.run(words, check=True)
        model = Place(Path(folder), Path(folder))
        place = Place(lab.paths[0] / "twin", lab.paths[1] / "twin")
        place.made.mkdir()
        made = Twins(model, place)
        try:
            yield made
        finally:
            made.close()
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("table", TABLES)
def test_as_on_a_tmpfs(twins: Twins, table: str, long_run: bool, figures: Figures) -> None:
    cases = list(TABLES[table]())
    if not long_run:
        cases = cases[:: max(len(cases) // 200, 1)]
    differences: list[str] = []
    for start in range(0, len(cases), TOGETHER):
        differences += twins.run(cases[start : start + TOGETHER])
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences[:50])
    figures.count("calls compared with a tmpfs", len(cases), table)
