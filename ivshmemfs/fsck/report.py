"""What a check found, in bounded memory for any region."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Generic, NamedTuple, ParamSpec

P = ParamSpec("P")

SHOWN = 50  # findings of one invariant that a report keeps; it counts the rest


class Place(NamedTuple):
    """Where a finding is; -1: does not apply."""

    block: int = -1
    ino: int = -1
    slot: int = -1

    def __str__(self) -> str:
        parts = (("inode", self.ino), ("block", self.block), ("slot", self.slot))
        return ", ".join(f"{name} {number}" for name, number in parts if number >= 0)


REGION = Place()


class Finding(NamedTuple):
    """One violation of an invariant; with `note`, a remark about an allowed state."""

    invariant: int
    place: Place
    text: str
    note: bool

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place != REGION else ""
        return f"I{self.invariant} {where}{self.text}"


class Invariant(Generic[P]):
    """One numbered invariant: its statement, and the function that finds violations.

    A call yields a phrase for each violation in the facts that it gets.  With `note`, the
    violation is allowed and the report has it as a remark.
    """

    def __init__(self, number: int, note: bool, function: Callable[P, Iterator[str]]) -> None:
        self.number: Final = number
        self.note: Final = note
        self.name: Final = function.__name__
        self.text: Final = " ".join((function.__doc__ or "").split())
        self._function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[str]:
        """Return a phrase for each violation."""
        return self._function(*args, **kwargs)


class Report:
    """The findings of one check, and what a repair did about them."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.counts: dict[int, int] = {}  # by invariant, notes included
        self.errors = 0
        self.notes = 0
        self.repairs: list[str] = []
        self.before: Report | None = None  # the check at the start of a repair
        self.summary = ""
        self.before_adding: Callable[[], None] = lambda: None

    def add(self, invariant: Invariant[P], place: Place, text: str) -> None:
        """Record one violation of `invariant`; raises what `before_adding` raises."""
        self.before_adding()
        count = self.counts.get(invariant.number, 0)
        self.counts[invariant.number] = count + 1
        if invariant.note:
            self.notes += 1
        else:
            self.errors += 1
        if count < SHOWN:
            self.findings.append(Finding(invariant.number, place, text, invariant.note))

    def test(
        self, invariant: Invariant[P], place: Place, *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Test `invariant` on facts from `place`; return whether they satisfy it."""
        good = True
        for text in invariant(*args, **kwargs):
            self.add(invariant, place, text)
            good = False
        return good

    @property
    def clean(self) -> bool:
        """Whether nothing violates the format; notes do not count."""
        return not self.errors

    def lines(self) -> Iterator[str]:
        """Return the findings as text, by number of the invariant."""
        for number in sorted(self.counts):
            shown = [f for f in self.findings if f.invariant == number]
            yield from (f"{'note: ' if f.note else ''}{f}" for f in shown)
            if more := self.counts[number] - len(shown):
                yield f"I{number} and {more} more of the same kind"

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "clean"
