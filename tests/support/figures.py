"""What campaigns did, which is printed at the end of a run."""

from __future__ import annotations


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
