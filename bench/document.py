"""Writes the figures and plots of a run into docs/performance.md, between two marks.

Nothing else of the page is touched; what the figures mean is for people to write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import sentence
from bench.plots import plots
from bench.report import OURS, is_rate, readable

BEGIN, END = "<!-- figures: python -m bench writes these -->", "<!-- end of figures -->"
#: What each kind of table compares with, in this order, and the name of the column.
PEERS = {
    "passthrough": "C passthrough",
    f"{OURS}-trio": "pyfuse3's trio loop",
    "tmpfs": "tmpfs",
    "memcpy": "memcpy",
    "9p": "virtio-9p",
    "virtiofs": "virtiofs",
}


class DocumentError(Exception):
    """The page has no place for the figures."""


def write(page: Path, document: Any, pictures: Sequence[Path]) -> None:
    """Replace the text between the marks; raises DocumentError when they are not there."""
    text = page.read_text()
    before, mark, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not mark or not end:
        raise DocumentError(f"{page} lacks the lines '{BEGIN}' and '{END}'")
    links = {path.stem: os.path.relpath(path, page.parent) for path in pictures}
    figures = "\n".join(_lines(document, links))
    page.write_text(f"{before}{BEGIN}\n\n{figures}\n{END}{after}")


def _lines(document: Any, links: Mapping[str, str]) -> Iterator[str]:
    yield sentence(document["machine"])
    for title, table in document["tables"].items():
        drawn = plots(title)
        if not drawn:  # what compares ours with itself is among the other figures
            continue
        yield f"\n### {title[0].upper()}{title[1:]}\n"
        for plot in drawn:
            if plot.name in links:
                yield f"![{plot.heading}]({links[plot.name]})\n"
        yield from _table(table)
    if document["figures"]:
        yield "\n### Other figures\n"
        yield "| group | figure | |\n|---|---|---|"
        for group, found in document["figures"].items():
            for name, value in found.items():
                yield f"| {group} | {name} | {readable(value)} |"


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    shown = [peer for peer in PEERS if any(peer in row for row in table.values())]
    yield (
        "| workload | | p50 | p99 | per second | "
        + " | ".join(f"to {PEERS[peer]}" for peer in shown)
        + " |"
    )
    yield "|---|---|" + "---:|" * (3 + len(shown))
    for workload, row in table.items():
        if OURS in row:
            yield _row(workload, row, shown)


def _row(workload: str, row: Mapping[str, Any], shown: Sequence[str]) -> str:
    ours, rate = row[OURS], is_rate(workload)
    cells = [workload, "rate" if rate else "time", _time(ours["p50"]), _time(ours["p99"])]
    cells.append(f"{ours['per_second']:,.0f}" if ours["per_second"] >= 10 else "")
    for peer in shown:
        if peer not in row:
            cells.append("")
            continue
        ratio = ours["p50"] / row[peer]["p50"]
        cells.append(f"{1 / ratio if rate else ratio:.2g}")
    return "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
