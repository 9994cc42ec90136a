"""The same calls on a tmpfs and on a mount: what differs is a defect, or a documented deviation.

A `Case` is a call with what it needs to be there.  `Twins.run` makes the surroundings of many
cases in both places, each in a directory of its own.  It lets a moment pass and makes the calls as
the callers that the cases name.  Then it compares what they returned and what is there.  That is
types, modes, owners, link counts, sizes, contents, targets, attributes, and which of three times of
which inode moved.  The state of the mount is looked at through another mount of the region.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.posix.actor import Actor
from tests.posix.calls import Call

#: The callers: number, group, further groups.
CALLERS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "root": (0, 0, ()),
    "owner": (65534, 65533, (65533, 65531)),
    "member": (65532, 65530, (65530, 65533)),
    "other": (65529, 65528, (65528,)),
}
OWNER, GROUP = CALLERS["owner"][:2]
MEMBER, OTHER = CALLERS["member"][0], CALLERS["other"][0]
#: A group of the owner's besides the first, and one without members.
SECOND_GROUP, FOREIGN_GROUP = 65531, 65500
#: Longer than a step of the clock that files are stamped with.
TICK = 0.02


@dataclass(frozen=True)
class Case:
    """One call, its caller, and what root makes for it first."""

    name: str
    setup: tuple[Call, ...]
    call: Call
    caller: str = "root"

    def __str__(self) -> str:
        return f"{self.name}: {self.caller} calls {self.call!r}"


@dataclass(frozen=True)
class Node:
    """What a look at a path shows; `facts` are compared, `times` only with another look."""

    ino: int
    facts: tuple[Any, ...]
    times: tuple[int, int, int]


def look(top: Path) -> dict[str, Node]:
    """Everything below `top`, itself included."""
    found: dict[str, Node] = {}
    inos: dict[int, int] = {}
    waiting = [top]
    while waiting:
        path = waiting.pop()
        status = path.lstat()
        name = os.path.relpath(path, top)
        content: Any = None
        if stat.S_ISDIR(status.st_mode):
            waiting += sorted((path / one for one in os.listdir(path)), reverse=True)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes() if status.st_size < 1 << 20 else status.st_size
        same = inos.setdefault(status.st_ino, len(inos))  # the same number for names of one file
        found[name] = Node(
            status.st_ino,
            (oct(status.st_mode), status.st_nlink, status.st_uid, status.st_gid, status.st_rdev,
             content, same, _attributes(path, status.st_mode)),
            (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns),
        )  # fmt: skip
    return found


def _attributes(path: Path, mode: int) -> tuple[tuple[str, bytes], ...]:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return ()
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def changed(before: dict[str, Node], after: dict[str, Node]) -> dict[str, str]:
    """Which times moved, by path now: letters of a(ccess), m(odification), c(hange), or "new"."""
    known = {node.ino: node.times for node in before.values()}
    moved: dict[str, str] = {}
    for path, node in after.items():
        old = known.get(node.ino)
        if old is None:
            moved[path] = "new"
        else:
            pairs = zip("amc", old, node.times, strict=True)
            moved[path] = "".join(letter for letter, one, two in pairs if one != two)
    return moved


class Place:
    """Where the calls are made, and where their effects are looked at."""

    def __init__(self, made: Path, seen: Path) -> None:
        self.made, self.seen = made, seen

    def below(self, name: str) -> Place:
        return Place(self.made / name, self.seen / name)


class Twins:
    """Two places that ought to behave alike, for one of the callers or for all."""

    def __init__(self, model: Place, place: Place, only: str | None = None) -> None:
        self.only = only
        self._places = (model, place)
        self._actors = {name: Actor(*who) for name, who in CALLERS.items()}
        self._runs = 0

    def close(self) -> None:
        """End the callers' processes."""
        for actor in self._actors.values():
            actor.close()

    def run(self, cases: Sequence[Case]) -> list[str]:
        """Every difference, as a line of text."""
        self._runs += 1
        first, second = (self._run(place.below(f"run{self._runs}"), cases)
                         for place in self._places)  # fmt: skip
        differences = []
        for case, one, two in zip(cases, first, second, strict=True):
            told = [f"{key}: {one.get(key)} but {two.get(key)}" for key in sorted({*one, *two})
                    if one.get(key) != two.get(key)]  # fmt: skip
            if told:
                differences.append(f"{case}\n    " + "\n    ".join(told))
        return differences

    def _run(self, place: Place, cases: Sequence[Case]) -> list[dict[str, Any]]:
        place.made.mkdir()
        place.made.chmod(0o777)
        top = str(place.made)
        root = self._actors["root"]
        steps: list[Call] = []
        for number, case in enumerate(cases):
            steps.append(("mkdir", f"{number}", 0o777))
            steps += [_moved(step, number) for step in case.setup]
        for step, came in zip(steps, root.batch(top, steps), strict=True):
            assert came is None or isinstance(came, int), (step, came)
        before = [look(place.seen / f"{number}") for number in range(len(cases))]
        time.sleep(TICK)
        came_of: dict[int, Any] = {}
        for name, actor in self._actors.items():
            mine = [number for number, case in enumerate(cases) if case.caller == name]
            calls = [_moved(cases[number].call, number) for number in mine]
            came_of |= zip(mine, actor.batch(top, calls), strict=True)
        results: list[dict[str, Any]] = []
        for number, old in enumerate(before):
            after = look(place.seen / f"{number}")
            told: dict[str, Any] = {"result": came_of[number]}
            told |= {f"{path}": node.facts for path, node in after.items()}
            told |= {f"times of {path}": moved for path, moved in changed(old, after).items()}
            results.append(told)
        shutil.rmtree(place.seen)
        return results


def _moved(call: Call, number: int) -> Call:
    """The call with each `Here` as a path below the case's directory."""
    return tuple(
        word.below(f"{number}")
        if isinstance(word, Here)
        else _moved(word, number)
        if isinstance(word, tuple)
        else word
        for word in call
    )


@dataclass(frozen=True)
class Here:
    """A path below the directory of a case."""

    path: str

    def below(self, folder: str) -> str:
        return f"{folder}/{self.path}" if self.path else ""
