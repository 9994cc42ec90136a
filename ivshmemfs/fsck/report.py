"""What a check found, in bounded memory however bad the region is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Generic, NamedTuple, ParamSpec

P = ParamSpec("P")

SHOWN = 50  # findings of one invariant that are kept; the rest is counted


class Place(NamedTuple):
    """Where something was found; -1 stands for "does not apply"."""

    block: int = -1
    ino: int = -1
    slot: int = -1

    def __str__(self) -> str:
        parts = (("inode", self.ino), ("block", self.block), ("slot", self.slot))
        return ", ".join(f"{name} {number}" for name, number in parts if number >= 0)


REGION = Place()


class Finding(NamedTuple):
    """One contradiction (or, if `note`, something worth saying that is no contradiction)."""

    invariant: int
    place: Place
    text: str
    note: bool

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place != REGION else ""
        return f"I{self.invariant} {where}{self.text}"


class Check(Generic[P]):
    """One numbered invariant: its statement, and the function that tells what contradicts it.

    Calling it yields a phrase for each contradiction in the facts it is given.  A check with
    `note` speaks of what is allowed but worth telling.
    """

    def __init__(self, number: int, note: bool, function: Callable[P, Iterator[str]]) -> None:
        self.number: Final = number
        self.note: Final = note
        self.name: Final = function.__name__
        self.text: Final = " ".join((function.__doc__ or "").split())
        self._function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[str]:
        """What contradicts the invariant, a phrase each."""
        return self._function(*args, **kwargs)


class Report:
    """Findings of one run, and what a repair did about them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.counts: dict[int, int] = {}  # by invariant, notes included
        self.errors = 0
        self.notes = 0
        self.repairs: list[str] = []
        self.before: Report | None = None  # what a repair found when it began
        self.summary = ""
        self.before_adding: Callable[[], None] = lambda: None

    def add(self, check: Check[P], place: Place, text: str) -> None:
        """Record one contradiction of `check`; may raise what `before_adding` raises."""
        self.before_adding()
        count = self.counts.get(check.number, 0)
        self.counts[check.number] = count + 1
        if check.note:
            self.notes += 1
        else:
            self.errors += 1
        if count < SHOWN:
            self.findings.append(Finding(check.number, place, text, check.note))

    def test(self, check: Check[P], place: Place, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Run `check` on facts found at `place`; whether they satisfy it."""
        good = True
        for text in check(*args, **kwargs):
            self.add(check, place, text)
            good = False
        return good

    @property
    def clean(self) -> bool:
        """Whether nothing contradicts the format (notes are allowed)."""
        return not self.errors

    def lines(self) -> Iterator[str]:
        """The findings as text, the most basic first."""
        for number in sorted(self.counts):
            shown = [f for f in self.findings if f.invariant == number]
            yield from (f"{'note: ' if f.note else ''}{f}" for f in shown)
            if more := self.counts[number] - len(shown):
                yield f"I{number} and {more} more of the same kind"

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "clean"
