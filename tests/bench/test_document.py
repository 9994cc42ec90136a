"""From figures to the page and its plots: what is written, what is kept, what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.document import BEGIN, END, DocumentError, write
from bench.machine import Machine, processor
from bench.plots import draw, speeds
from bench.runner import Sample

TITLE = "client and daemon on 1 CPU"
MACHINE: Machine = {
    "cpus": 2, "machine": "x86_64", "cpu": "Fast One", "guest": True, "kernel": "6.1.0",
    "python": "3.11.2", "empty_call": 61.3, "fresh_page": 204.0,
}  # fmt: skip
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="draws: sh scripts/setup --bench"
)


def figures(**stat: float) -> Any:
    """A document in which `stat` took these seconds on each peer, and a read half of them."""

    def samples(seconds: float) -> list[Sample]:
        return [Sample(10, seconds * 10, seconds, seconds * 2, 0)]

    table = {
        "stat": {peer.replace("_", "-"): samples(seconds) for peer, seconds in stat.items()},
        "read-1M": {peer.replace("_", "-"): samples(seconds / 2) for peer, seconds in stat.items()},
    }
    return report.as_json(MACHINE, {TITLE: table}, {"start": {"mount 16G": 0.25}})


def page(path: Path) -> Path:
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_figures_stand_between_the_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    made = page(tmp_path / "page.md")
    document = figures(ivshmemfs=30e-6, passthrough=20e-6, tmpfs=1e-6)
    for _again in range(2):
        write(made, document, [])
        text = made.read_text()
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
        assert "on a virtual machine with 2 CPUs (Fast One, x86_64), Linux 6.1.0, Python" in text
        assert "system call takes 61 ns, the first store to a page 204." in text
        assert "| stat | time | 30 µs | 60 µs | 33,333 | 1.5 | 30 |" in text
        assert "| read-1M | rate | 15 µs | 30 µs | 66,667 | 0.67 | 0.033 |" in text
        assert "| start | mount 16G | 0.250 |" in text


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    made.write_text("no place\n")
    with pytest.raises(DocumentError, match=r"page\.md lacks the lines"):
        write(made, figures(ivshmemfs=1e-6), [])
    assert made.read_text() == "no place\n"


def test_what_is_not_measured_again_is_kept() -> None:
    old, new = figures(ivshmemfs=2e-6), figures(ivshmemfs=1e-6)
    del new["tables"][TITLE]["read-1M"]
    new["figures"] = {"idle": {"idle CPU": 0.0}}
    both = report.merged(old, new)
    assert both["tables"][TITLE]["stat"]["ivshmemfs"]["p50"] == 1e-6
    assert both["tables"][TITLE]["read-1M"]["ivshmemfs"]["p50"] == 1e-6  # half of the old 2 µs
    assert set(both["figures"]) == {"start", "idle"}


def test_speeds_are_relative_to_the_base() -> None:
    row = figures(ivshmemfs=30e-6, passthrough=20e-6)["tables"][TITLE]["stat"]
    assert speeds(row, "passthrough") == pytest.approx({"ivshmemfs": 2 / 3, "passthrough": 1})


@needs_matplotlib
def test_plots_are_small_and_the_same_for_the_same_figures(tmp_path: Path) -> None:
    document = figures(ivshmemfs=30e-6, passthrough=20e-6, tmpfs=1e-6)
    made = draw(document, tmp_path / "one")
    assert [path.name for path in made] == ["times-1.svg", "rates-1.svg"]
    again = draw(document, tmp_path / "two")
    for path, same in zip(made, again, strict=True):
        assert path.read_bytes() == same.read_bytes()
        assert path.stat().st_size < 60 * 1024
        assert "libfuse passthrough in C" in path.read_text()


@needs_matplotlib
def test_the_page_shows_the_plots(tmp_path: Path) -> None:
    document = figures(ivshmemfs=30e-6, passthrough=20e-6, tmpfs=1e-6)
    made = page(tmp_path / "page.md")
    write(made, document, draw(document, tmp_path / "figures"))
    assert "(figures/times-1.svg)" in made.read_text()
    assert "(figures/rates-1.svg)" in made.read_text()


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        ("model name\t: Fast\nflags\t: fpu hypervisor\n\nmodel name\t: 2\n", ("Fast", True)),
        ("model name\t: Fast One\nflags\t\t: fpu sse\n", ("Fast One", False)),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", ("", False)),
        ("", ("", False)),
    ],
)  # fmt: skip
def test_the_kernel_names_the_processor(cpuinfo: str, wanted: tuple[str, bool]) -> None:
    assert processor(cpuinfo) == wanted
