"""Tables of cases, each made on a tmpfs and on a mount: the outcomes must be the same."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.posix import tables
from tests.posix.twin import Case, Place, Twins
from tests.support.figures import Figures
from tests.support.lab import EVERYTHING, needs_fuse, needs_root, new_lab

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


#: Mount options: with the first the kernel checks permissions, with the second there is no need.
MOUNTS = {"everybody": EVERYTHING, "root only": "suid,dev"}


@pytest.fixture(scope="module", params=MOUNTS)
def twins(request: pytest.FixtureRequest) -> Iterator[Twins]:
    """A tmpfs that leaves access times alone, and two mounts of a region."""
    with (
        new_lab(128 << 20, 2, MOUNTS[request.param]) as lab,
        tempfile.TemporaryDirectory(prefix="ivshmemfs-twin-") as folder,
    ):
        words = ["mount", "-t", "tmpfs", "-o", "noatime,mode=0777", "twin", folder]
        subprocess.run(words, check=True)
        model = Place(Path(folder), Path(folder))
        place = Place(lab.paths[0] / "twin", lab.paths[1] / "twin")
        place.made.mkdir()
        made = Twins(model, place, "root" if request.param == "root only" else None)
        try:
            yield made
        finally:
            made.close()
            subprocess.run(["umount", folder], check=True)


def _needs_the_sticky_bit(case: Case) -> bool:
    """Documented: where nothing is checked, the kernel knows of no sticky bits."""
    modes = [step[2] for step in case.setup if step[0] == "chmod"]
    sticky = any(mode & stat.S_ISVTX for mode in modes)
    creates = case.call[0] == "open" and case.call[2] & os.O_CREAT
    return sticky and bool(creates or (case.call[0] == "chown" and case.call[2:] == (-1, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_as_on_a_tmpfs(twins: Twins, table: str, long_run: bool, figures: Figures) -> None:
    cases = [case for case in TABLES[table]() if twins.only in (None, case.caller)]
    if twins.only:
        cases = [case for case in cases if not _needs_the_sticky_bit(case)]
    if not long_run:
        cases = cases[:: max(len(cases) // 150, 1)]
    differences: list[str] = []
    for start in range(0, len(cases), TOGETHER):
        differences += twins.run(cases[start : start + TOGETHER])
    assert not differences, f"{len(differences)} differences\n" + "\n".join(differences[:50])
    figures.count("calls compared with a tmpfs", len(cases), table)
