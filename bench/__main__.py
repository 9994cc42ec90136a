"""`python -m bench`: measure, print, save, draw."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from bench import build, peers, report, special
from bench.peers import Peer
from bench.runner import Client, Table, interleave
from bench.workloads import MEMCPY, QUICK, Scale, Workloads

SPECIAL = (
    "visibility", "commits", "transfer", "directories", "sizes", "start", "idle", "memory"
)  # fmt: skip
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
        client = Client(self.program, cpus)
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

    # --- everything else ------------------------------------------------------------------

    def special(self, name: str, quick: bool) -> None:
        """One of `SPECIAL`."""
        rounds, looks = self.scale.rounds, self.scale.looks
        client = Client(self.program, peers.available_cpus())
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

    def _figures(self, name: str, client: Client, quick: bool) -> None:
        rounds, shm, work = self.scale.rounds, self.shm, self.work
        size = "1G" if quick else "16G"
        if name == "visibility":
            found = special.visibility(client, shm, work, rounds=rounds, count=50)
        elif name == "commits":
            found = special.commits(client, shm, work, rounds=rounds)
        elif name == "transfer":
            found = special.transfer(client, shm, work, rounds=rounds, mib=16 if quick else 256)
        elif name == "start":
            found = special.start(shm, work, rounds=rounds, size=size)
        elif name == "idle":
            found = special.idle(client, shm, work, seconds=2 if quick else 10)
        else:
            files = 2000 if quick else 100_000
            found = special.memory(client, shm, work, files=files, size=size)
        self.figures[name] = found
        report.show_figures(self.console, name, found)

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
@click.option("--only", multiple=True, type=click.Choice([*GROUPS, *SPECIAL]), help="Only these.")
@click.option("--peer", multiple=True, type=click.Choice(PEERS), help="Only beside these.")
@click.option("--cores", default="1,2", show_default=True, help="Numbers of CPUs to pin to.")
@click.option("--rounds", type=int, help="Rounds; medians are taken over them.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures there.")
@click.option(
    "--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw SVG files there."
)
def main(
    quick: bool,
    only: tuple[str, ...],
    peer: tuple[str, ...],
    cores: str,
    rounds: int | None,
    output: Path | None,
    plots: Path | None,
) -> None:
    """Measure ivshmemfs beside tmpfs, memcpy and a file system in C; needs root or fusermount3."""
    scale = QUICK if quick else Scale()
    if rounds is not None:
        scale = Scale(**{**scale.__dict__, "rounds": rounds})
    groups = [group for group in GROUPS if group in only or not only]
    with (
        tempfile.TemporaryDirectory(prefix="ivshmemfs-bench-", dir="/dev/shm") as shm,
        tempfile.TemporaryDirectory(prefix="ivshmemfs-bench-") as work,
    ):
        try:
            bench = Bench(Console(), scale, Path(shm), Path(work))
        except build.BuildError as error:
            sys.exit(f"bench: {error}")
        available = peers.available_cpus()
        for count in [int(word) for word in cores.split(",") if groups]:
            if count <= len(available):
                bench.side_by_side(available[-count:], groups, peer or DEFAULT_PEERS)
        for name in SPECIAL:
            if name in only or not only:
                bench.special(name, quick)
    document = report.as_json(bench.tables, bench.figures)
    if output is not None:
        report.save(output, document)
    if plots is not None:
        from bench.plots import draw

        draw(document, plots)


if __name__ == "__main__":
    main()
