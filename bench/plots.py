"""Plots of what was measured: bars of ratios, for the documentation.  Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import OURS, is_rate

#: What the bars of the two kinds of plots are divided by.
LATENCY_BASE = "passthrough"
RATE_BASE = "tmpfs"


def draw(document: Any, folder: Path) -> None:
    """Draw one plot of times and one of rates per table, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ivshmemfs"  # the same picture for the same figures
    folder.mkdir(parents=True, exist_ok=True)
    for title, table in document["tables"].items():
        if not title.startswith("client and daemon"):
            continue
        cores = title.split()[-2]
        times = {name: row for name, row in table.items() if not is_rate(name)}
        rates = {name: row for name, row in table.items() if is_rate(name)}
        if times:
            heading = f"time per operation, relative to libfuse in C ({title})"
            _bars(folder / f"times-{cores}.svg", heading, times, LATENCY_BASE, rates=False)
        if rates:
            heading = f"throughput, relative to tmpfs ({title})"
            _bars(folder / f"rates-{cores}.svg", heading, rates, RATE_BASE, rates=True)


def _bars(path: Path, heading: str, table: Any, base: str, *, rates: bool) -> None:
    from matplotlib import pyplot

    shown = [OURS, f"{OURS}-trio", "passthrough"]
    shown = [name for name in shown if name != base and any(name in row for row in table.values())]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(table) * max(len(shown), 1) ** 0.5 + 1.5))
    height = 0.8 / max(len(shown), 1)
    for index, name in enumerate(shown):
        places, lengths = [], []
        for place, row in enumerate(table.values()):
            if name in row and base in row:
                places.append(place + index * height)
                ratio = row[name]["p50"] / row[base]["p50"]
                lengths.append(1 / ratio if rates else ratio)
        axes.barh(places, lengths, height, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(table))], list(table))
    axes.invert_yaxis()
    axes.set_title(heading, fontsize=10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
