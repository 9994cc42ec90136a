"""Plots of what was measured, for the documentation: small SVG files.  Needs matplotlib.

Each row is a workload, each dot a file system.  The vertical line is what they are compared with.
Better is always to the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import OURS, is_rate

#: How each peer is shown: its name in the legend, its colour, its mark.
STYLES = {
    OURS: ("ivshmemfs", "#0b6e4f", "o"),
    f"{OURS}-trio": ("on pyfuse3's own loop", "#9a9a9a", "s"),
    "passthrough": ("libfuse passthrough in C", "#c8553d", "D"),
    "tmpfs": ("tmpfs", "#33658a", "^"),
    "memcpy": ("memcpy of a mapping", "#7d5ba6", "v"),
    "9p": ("virtio-9p", "#c8553d", "D"),
    "virtiofs": ("virtiofs", "#33658a", "^"),
}


class Plot(NamedTuple):
    """One picture: its file, its heading, whose figures are 1, and which workloads it shows."""

    name: str
    heading: str
    base: str
    rates: bool


def plots(title: str) -> list[Plot]:
    """What is drawn of the table with this title."""
    if title.startswith("client and daemon"):
        cpus = title.split()[-2]
        return [
            Plot(f"times-{cpus}", f"Speed of operations ({title})", "passthrough", False),
            Plot(f"rates-{cpus}", f"Throughput ({title})", "tmpfs", True),
        ]
    if title.startswith("in a guest"):
        return [
            Plot("guest-times", f"Speed of operations, {title}", "9p", False),
            Plot("guest-rates", f"Throughput, {title}", "9p", True),
        ]
    return []


def draw(document: Any, folder: Path) -> list[Path]:
    """Draw the plots of every table; returns the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "ivshmemfs",  # the same picture for the same figures
            "svg.fonttype": "none",  # text as text: a tenth of the size
            "font.family": "sans-serif",
            "font.size": 9,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for title, table in document["tables"].items():
        for plot in plots(title):
            rows = {
                name: row
                for name, row in table.items()
                if is_rate(name) == plot.rates and plot.base in row and OURS in row
            }
            if rows:
                made.append(_draw(folder / f"{plot.name}.svg", plot, rows))
    return made


def speeds(row: Mapping[str, Any], base: str) -> dict[str, float]:
    """How many times as fast as *base* each peer is at a workload."""
    return {peer: row[base]["p50"] / row[peer]["p50"] for peer in row if peer in STYLES}


def _draw(path: Path, plot: Plot, rows: Mapping[str, Any]) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 0.27 * len(rows) + 1.5))
    found = [speeds(row, plot.base) for row in rows.values()]
    for peer, (label, colour, mark) in STYLES.items():
        if peer == plot.base:
            continue
        places = [place for place, row in enumerate(found) if peer in row]
        if places:
            values = [found[place][peer] for place in places]
            axes.plot(values, places, mark, color=colour, label=label, markersize=6, zorder=3)
    axes.axvline(1.0, color=STYLES[plot.base][1], linewidth=1.5, label=STYLES[plot.base][0])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.6)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times as fast as " + STYLES[plot.base][0] + "  (right is better)")
    axes.set_title(plot.heading, fontsize=10, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path
