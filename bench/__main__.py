"""`python -m bench`: measure, print, save, draw."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from bench import build, guest, machine, peers, report, requests, special
from bench.commits import commits
from bench.messages import messages
from bench.notify import notify
from bench.peers import Peer
from bench.runner import LocalClient, Table, interleave
from bench.values import values
from bench.workloads import MEMCPY, QUICK, Scale, Workloads

SPECIAL = (
    "visibility", "commits", "transfer", "directories", "sizes", "start", "idle", "memory",
    "values", "requests", "notify", "messages",
)  # fmt: skip
IN_A_GUEST = "guest"
GROUPS = ("look", "names", "random", "sequential", "readdir", "cp", "tree")
PEERS = ("tmpfs", "memcpy", "passthrough", "passthrough-never", "ivshmemfs-trio")
DEFAULT_PEERS = ("tmpfs", "memcpy", "passthrough", "ivshmemfs-trio")


class Bench:
    """One run: what is compiled, where things are, and what was measured so far."""

    def __init__(self, console: Console, scale: Scale, shm: Path, work: Path) -> None:
        self.console = console
        self.scale = scale
        self.shm = shm
        self.work = work
        self.program = build.client(work)
        self.passthrough = build.passthrough(work)
        self.tables: dict[str, Table] = {}
        self.figures: dict[str, special.Figures] = {}

    # --- side by side ---------------------------------------------------------------------

    @contextmanager
    def _mounted(self, cpus: Sequence[int], chosen: Sequence[str]) -> Iterator[list[Peer]]:
        with ExitStack() as stack:
            shm = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.shm)))
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.work)))
            found: list[Peer] = []
            if "tmpfs" in chosen:
                found.append(stack.enter_context(peers.tmpfs(shm)))
            for name in ("passthrough", "passthrough-never"):
                if name in chosen and self.passthrough is not None:
                    cache = "never" if name.endswith("never") else "auto"
                    found.append(
                        stack.enter_context(
                            peers.passthrough(self.passthrough, shm, work, cpus, cache=cache)
                        )
                    )
            for name, options in (("ivshmemfs-trio", "loop=trio"), (report.OURS, "")):
                if name in chosen or name == report.OURS:
                    region = peers.make_region(shm / f"{name}.region", self.scale.region)
                    mount = peers.ours(region, work / name, cpus, name=name, options=options)
                    found.append(stack.enter_context(mount))
            yield found

    def side_by_side(
        self, cpus: Sequence[int], groups: Sequence[str], chosen: Sequence[str]
    ) -> None:
        """Every workload on every peer, client and daemons on *cpus*."""
        title = f"client and daemon on {len(cpus)} CPU{'s' * (len(cpus) > 1)}"
        table = self.tables.setdefault(title, {})
        client = LocalClient(self.program, cpus)
        with (
            self._mounted(cpus, chosen) as found,
            Progress(console=self.console, transient=True) as progress,
            tempfile.TemporaryDirectory(dir=self.shm) as source,
        ):
            workloads = Workloads(client, self.scale, Path(source) / "source")
            workloads.prepare()
            task = progress.add_task(title, total=0)
            for group in groups:
                on = list(found)
                if group == "sequential" and MEMCPY in chosen:
                    (Path(source) / MEMCPY).mkdir()
                    on.append(Peer(MEMCPY, Path(source) / MEMCPY))
                runs = len(on) * self.scale.rounds
                progress.update(task, description=f"{title}: {group}", total=runs, completed=0)
                interleave(
                    on, self.scale.rounds, workloads.groups[group], table,
                    lambda: progress.advance(task),
                )  # fmt: skip
        report.show_table(self.console, title, table)

    def in_a_guest(self, quick: bool, rounds: int | None) -> None:
        """Every workload in a guest, on ours, virtio-9p and virtiofs."""
        if missing := guest.missing():
            self.console.print(f"in a guest: left out: {missing}", soft_wrap=True)
            return
        title = guest.title()
        self.tables[title], self.figures[title] = guest.measure(
            self.shm, self.work, quick=quick, rounds=rounds, on_run=self.console.log
        )
        report.show_table(self.console, title, self.tables[title])
        report.show_figures(self.console, title, self.figures[title])

    # --- everything else ------------------------------------------------------------------

    def special(self, name: str, quick: bool) -> None:
        """One of `SPECIAL`."""
        rounds, looks = self.scale.rounds, self.scale.looks
        client = LocalClient(self.program, peers.available_cpus())
        shm, work = self.shm, self.work
        if name == "directories":
            large = 2000 if quick else 100_000
            table = special.directories(
                client, shm, work, rounds=rounds, large=large, times=looks // 3
            )
            self._compare("directories", table, "100", (str(large),))
            self._compare("directories", table, "100 by two", (f"{large} by two",))
        elif name == "sizes":
            size = "1G" if quick else "16G"
            table = special.region_sizes(
                client, shm, work, rounds=rounds, count=looks // 2, large=size
            )
            self._compare("size of the region", table, "64M", (size,))
        else:
            self._figures(name, client, quick)

    def _figures(self, name: str, client: LocalClient, quick: bool) -> None:
        rounds, shm, work = self.scale.rounds, self.shm, self.work
        size = "1G" if quick else "16G"
        if name == "visibility":
            found = special.visibility(client, shm, work, rounds=rounds, count=50)
        elif name == "commits":
            found = self._commits()
        elif name == "transfer":
            found = special.transfer(client, shm, work, rounds=rounds, mib=16 if quick else 1024)
        elif name == "start":
            found = special.start(shm, work, rounds=rounds, size=size)
        elif name == "requests":
            found = self._requests(200 if quick else 1000)
        elif name == "notify":
            found = notify(shm, work, rounds=rounds, seconds=0.5 if quick else 3)
        elif name == "messages":
            found = messages(shm, rounds=rounds, count=300 if quick else 5_000)
        elif name == "values":
            found = values(shm, work, rounds=rounds, count=1000 if quick else 10_000)
        elif name == "idle":
            found = special.idle(client, shm, work, seconds=2 if quick else 10)
        else:
            files = 2000 if quick else 100_000
            found = special.memory(client, shm, work, files=files, size=size)
        self.figures[name] = found
        report.show_figures(self.console, name, found)

    def _commits(self) -> dict[str, float]:
        """On one CPU, and on all of them."""
        found: dict[str, float] = {}
        available = peers.available_cpus()
        for cpus in sorted({1, len(available)}):
            with ExitStack() as stack:
                shm = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.shm)))
                work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.work)))
                figures = commits(
                    self.program, self.passthrough, shm, work, available[-cpus:],
                    rounds=self.scale.rounds,
                )  # fmt: skip
            found |= {f"{cpus} CPU{'s' * (cpus > 1)}, {name}": it for name, it in figures.items()}
        return found

    def _requests(self, files: int) -> dict[str, float]:
        if reason := requests.missing():
            self.console.print(f"requests: left out: {reason}", soft_wrap=True)
            return {}
        source = self.shm / "requests"
        client = LocalClient(self.program, peers.available_cpus())
        scale = Scale(**{**self.scale.__dict__, "tree_files": files})
        Workloads(client, scale, source).prepare()
        with self._mounted(peers.available_cpus(), ("passthrough",)) as found:
            return requests.requests(found[::-1], source, files)

    def _compare(self, title: str, table: Table, base: str, others: Sequence[str]) -> None:
        """Show how much longer each operation takes than on *base*."""
        self.tables[title] = table
        figures = {
            f"{operation}: {other} / {base}": report.ratio("", by_peer[other], by_peer[base])
            for operation, by_peer in table.items()
            for other in others
        }
        self.figures.setdefault(title, {}).update(figures)
        report.show_figures(self.console, title, figures)


@click.command()
@click.option("--quick", is_flag=True, help="Small amounts: shows that it works, measures little.")
@click.option(
    "--only", multiple=True, type=click.Choice([*GROUPS, *SPECIAL, IN_A_GUEST]), help="Only these."
)
@click.option("--peer", multiple=True, type=click.Choice(PEERS), help="Only beside these.")
@click.option("--cores", default="1,2", show_default=True, help="Numbers of CPUs to pin to.")
@click.option("--rounds", type=int, help="Rounds; medians are taken over them.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures there.")
@click.option("--keep", is_flag=True, help="Keep what the JSON file has of what is not measured.")
@click.option("--redraw", is_flag=True, help="Measure nothing: draw what the JSON file has.")
@click.option(
    "--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw SVG files there."
)
@click.option(
    "--document", "page", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Write figures and plots into this page, between its marks.",
)  # fmt: skip
def main(
    quick: bool,
    only: tuple[str, ...],
    peer: tuple[str, ...],
    cores: str,
    rounds: int | None,
    output: Path | None,
    keep: bool,
    redraw: bool,
    plots: Path | None,
    page: Path | None,
) -> None:
    """Measure ivshmemfs beside tmpfs, memcpy and a file system in C; needs root or fusermount3."""
    if (keep or redraw) and output is None:
        raise click.UsageError("--keep and --redraw need --json FILE")
    if (plots or page) and not can_draw():
        sys.exit("bench: plots need matplotlib: run 'sh scripts/setup --bench'")
    document: Any = None
    if output is not None and (redraw or (keep and output.exists())):
        document = report.load(output)
    if not redraw:
        try:
            made = _measure(quick, only, peer, cores, rounds)
        except build.BuildError as error:
            sys.exit(f"bench: {error}")
        document = report.merged(document, made) if document else made
        if output is not None:
            report.save(output, document)
    if plots is not None or page is not None:
        _show(document, plots, page)


def _measure(
    quick: bool, only: tuple[str, ...], peer: tuple[str, ...], cores: str, rounds: int | None
) -> Any:
    """Everything that was asked for, as JSON can hold it."""
    scale = QUICK if quick else Scale()
    if rounds is not None:
        scale = Scale(**{**scale.__dict__, "rounds": rounds})
    groups = [group for group in GROUPS if group in only or not only]
    with (
        tempfile.TemporaryDirectory(prefix="ivshmemfs-bench-", dir="/dev/shm") as shm,
        tempfile.TemporaryDirectory(prefix="ivshmemfs-bench-") as work,
    ):
        bench = Bench(Console(), scale, Path(shm), Path(work))
        available = peers.available_cpus()
        measured_on = machine.describe(LocalClient(bench.program, available[-1:]), Path(work))
        bench.console.print(machine.sentence(measured_on), soft_wrap=True)
        for count in [int(word) for word in cores.split(",") if groups]:
            if count <= len(available):
                bench.side_by_side(available[-count:], groups, peer or DEFAULT_PEERS)
        for name in SPECIAL:
            if name in only or not only:
                bench.special(name, quick)
        if IN_A_GUEST in only or not only:
            bench.in_a_guest(quick, rounds)
        return report.as_json(measured_on, bench.tables, bench.figures)


def _show(document: Any, plots: Path | None, page: Path | None) -> None:
    from bench.document import DocumentError, write
    from bench.plots import draw

    if plots is None and page is not None:
        plots = page.parent / "figures"
    if plots is not None:
        made = draw(document, plots)
        if page is not None:
            try:
                write(page, document, made)
            except DocumentError as error:
                sys.exit(f"bench: {error}")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


if __name__ == "__main__":
    main()
