"""Tables for the terminal, and one JSON file for everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.machine import Machine
from bench.runner import Sample, Table, summary

#: Workloads whose figure is a rate of bytes; all others are times per operation.
RATES = ("read-", "write-", "cp")
OURS = "ivshmemfs"


def is_rate(workload: str) -> bool:
    """Whether more is better."""
    return workload.startswith(RATES) and "tree" not in workload and "-a" not in workload


def ratio(workload: str, ours: list[Sample], other: list[Sample]) -> float:
    """Ours to another's: of throughput where more is better, else of the median time."""
    mine, theirs = summary(ours).p50, summary(other).p50
    return theirs / mine if is_rate(workload) else mine / theirs


def show_table(console: Console, title: str, table: Table, *, ours: str = OURS) -> None:
    """One row per workload: *ours* against each of the others."""
    others = [name for name in _columns(table) if name != ours]
    made = RichTable(title=f"{ours}: {title}", title_justify="left", caption_justify="left")
    made.caption = "rates: more is better; times: less is better; medians of rounds"
    made.add_column("workload", no_wrap=True)
    made.add_column("", no_wrap=True)
    for other in others:
        made.add_column(f"/ {other.removeprefix(f'{ours}-')}", justify="right", overflow="fold")
    made.add_column("spread", justify="right", no_wrap=True)
    made.add_column("ops/s", justify="right", no_wrap=True)
    for workload, by_peer in table.items():
        if ours not in by_peer:
            continue
        mine = summary(by_peer[ours])
        cells = [
            f"{ratio(workload, by_peer[ours], by_peer[other]):.2f}" if other in by_peer else ""
            for other in others
        ]
        kind = "rate" if is_rate(workload) else "time"
        spread = f"{mine.low / mine.p50:.2f}–{mine.high / mine.p50:.2f}"
        made.add_row(workload, kind, *cells, spread, f"{1 / mine.p50:,.0f}")
    console.print(made)


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for by_peer in table.values() for name in by_peer))


def show_figures(console: Console, title: str, figures: Mapping[str, float]) -> None:
    """Names and numbers."""
    made = RichTable(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        made.add_row(name, readable(value))
    console.print(made)


def readable(value: float) -> str:
    """A number as people write it."""
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def as_json(
    machine: Machine,
    tables: Mapping[str, Table],
    figures: Mapping[str, Mapping[str, float]],
) -> Any:
    """Everything that was measured, as JSON can hold it."""
    return {
        "machine": machine,
        "tables": {
            title: {
                workload: {peer: summary(samples)._asdict() for peer, samples in by_peer.items()}
                for workload, by_peer in table.items()
            }
            for title, table in tables.items()
        },
        "figures": figures,
    }


def merged(old: Any, new: Any) -> Any:
    """The figures of a run, and those of an earlier one for what it did not measure."""
    tables = {title: dict(table) for title, table in old["tables"].items()}
    for title, table in new["tables"].items():
        tables.setdefault(title, {}).update(table)
    return {**new, "tables": tables, "figures": {**old["figures"], **new["figures"]}}


def load(path: Path) -> Any:
    """Read the JSON file of an earlier run."""
    return json.loads(path.read_text())


def save(path: Path, document: Any) -> None:
    """Write the JSON file."""
    path.write_text(json.dumps(document, indent=1) + "\n")
