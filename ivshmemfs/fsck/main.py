"""fsck.ivshmemfs: the command.

Exit codes as in fsck(8): 0 clean, 1 corrected, 4 errors left, 8 operational error, 16 usage,
32 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import NoReturn

import click

from ivshmemfs import __version__
from ivshmemfs import command as shared
from ivshmemfs.completion import complete_region
from ivshmemfs.format.superblock import identify
from ivshmemfs.fsck.check import check
from ivshmemfs.fsck.repair import repair
from ivshmemfs.fsck.report import Report
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say
from ivshmemfs.region import open_region

CLEAN, CORRECTED, UNCORRECTED, OPERATIONAL, USAGE, CANCELLED = 0, 1, 4, 8, 16, 32
EXITS = shared.Exits(usage=USAGE, system=OPERATIONAL, interrupted=CANCELLED, internal=OPERATIONAL)


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _tell(report: Report, spec: str) -> None:
    if report.before is not None and report.repairs:
        _echo(report.before.lines())
        _echo(f"repaired: {line}" for line in report.repairs)
    _echo(report.lines())
    many = "" if report.errors == 1 else "s"
    verdict = "clean" if report.clean else f"{report.errors} contradiction{many}"
    say(f"{spec}: {verdict}; {report.summary}")


def _described(report: Report) -> dict[str, object]:
    """Return the members of the JSON object for one check."""
    return {
        "clean": report.clean,
        "errors": report.errors,
        "notes": report.notes,
        "summary": report.summary,
        "findings": [
            {
                "invariant": finding.invariant,
                "note": finding.note,
                "inode": _or_none(finding.place.ino),
                "block": _or_none(finding.place.block),
                "slot": _or_none(finding.place.slot),
                "text": finding.text,
            }
            for finding in report.findings
        ],
        "counts": {f"I{number}": count for number, count in sorted(report.counts.items())},
    }


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _tell_json(report: Report, spec: str) -> None:
    before = report.before if report.repairs else None
    told: dict[str, object] = {
        "region": spec,
        **_described(report),
        "repairs": report.repairs,
        "before": None if before is None else _described(before),
    }
    say(json.dumps(told))


def _run(spec: str, change: bool, force: bool, as_json: bool) -> int:
    with open_region(spec, readonly=not change, identify=identify) as region:
        report = repair(region, force=force) if change else check(region)
        if as_json:
            _tell_json(report, region.spec)
        else:
            _tell(report, region.spec)
    if not report.clean:
        return UNCORRECTED
    corrected = report.repairs or (report.before and report.before.findings)
    return CORRECTED if corrected else CLEAN


MANUAL = Manual(
    examples=(
        Example("fsck.ivshmemfs /dev/shm/hello", "Check a region; store nothing."),
        Example("fsck.ivshmemfs -y /dev/shm/hello", "Repair a region that no peer has mounted."),
        Example("fsck.ivshmemfs --json pci | jq .clean", "Check for a program."),
    ),
    exits={
        CLEAN: "clean",
        CORRECTED: "repaired",
        UNCORRECTED: "something is wrong and was left so",
        OPERATIONAL: "the region could not be checked or repaired",
        USAGE: "wrong usage",
        CANCELLED: "interrupted by a signal",
    },
)


@click.command(cls=Command, manual=MANUAL, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "check_only", is_flag=True, help="Only check, store nothing (the default).")
@click.option("-y", "change", is_flag=True, help="Repair what is wrong.")
@click.option("-p", "-a", "preen", is_flag=True, help="The same as -y, as fsck(8) calls it.")
@click.option("-f", "_always", is_flag=True, help="Accepted and ignored: it always checks.")
@click.option("--force", is_flag=True, help="Repair although peers may be using the region.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.version_option(__version__, "-V", "--version", prog_name="fsck.ivshmemfs")
@click.argument("region", shell_complete=complete_region)
def command(
    check_only: bool,
    change: bool,
    preen: bool,
    _always: bool,
    force: bool,
    as_json: bool,
    region: str,
) -> int:
    """Check the filesystem on REGION, and repair it with -y.

    Checking is possible at any time.  Repairing needs a region that no peer has mounted.  A mount
    that starts meanwhile waits for 3 s, then refuses.

    Members of the JSON object: region, clean, errors, notes, summary, findings, counts, repairs,
    before.  A finding has invariant, note, inode, block, slot, text.  At most 50 findings of an
    invariant are listed; counts has all.  before is the check before a repair, or null.
    """
    change = change or preen
    if check_only and change:
        raise click.UsageError("-n and -y exclude each other")
    return _run(region, change, force, as_json)


def main(args: list[str] | None = None, prog_name: str = "fsck.ivshmemfs") -> NoReturn:
    """Run the command; leaves by SystemExit with an exit code of fsck(8)."""

    def run() -> int:
        result: int = command.main(args, prog_name=prog_name, standalone_mode=False)
        return result

    sys.exit(shared.run(prog_name, run, EXITS))
