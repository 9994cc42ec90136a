"""`doctor`: one line for each thing that keeps a region from working well, and what to type."""

from __future__ import annotations

import json
from collections.abc import Callable

import click

from ivshmemfs import __version__
from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.doctor.checks import (
    FAIL,
    WARN,
    Finding,
    as_rows,
    check_machine,
    check_region,
    worst,
)
from ivshmemfs.cli.doctor.facts import facts, machine
from ivshmemfs.cli.doctor.hypervisor import lines
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import show
from ivshmemfs.errors import RegionError, UsageError
from ivshmemfs.format.superblock import identify
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say
from ivshmemfs.region import discover, identified

#: Exit codes: mount(8) has 32 for a failure and 64 for success of a part.
EXITS = {FAIL: 32, WARN: 64}


MANUAL = Manual(
    examples=(
        Example("ivshmemfs doctor /dev/shm/hello", "Check a region and this machine."),
        Example("ivshmemfs doctor --json pci | jq .level", "Print ok, warn or fail."),
        Example("ivshmemfs doctor --qemu label=hello", "Print the lines for QEMU and fstab."),
    ),
    exits=exits(
        {0: "all is well", EXITS[FAIL]: "a check fails", EXITS[WARN]: "a check warns, none fails"}
    ),
)


@click.command("doctor", cls=Command, manual=MANUAL)
@click.argument("region", required=False, shell_complete=complete_any_region)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the lines.")
@click.option("--qemu", is_flag=True, help="Print the lines for QEMU, libvirt, fstab and udev.")
def doctor_command(region: str | None, as_json: bool, qemu: bool) -> int:
    """Check REGION and this machine: one line a check, with the reason and what to type.

    Without REGION it checks every region here that has a filesystem.  It joins the peers for a
    moment to test compare-and-swap, and watches silent peers for 3 s.
    """
    if qemu:
        if region is None or as_json:
            raise UsageError("--qemu takes one REGION, and no --json")
        return _print_lines(region)
    here = machine()
    found: dict[str, list[Finding]] = {}
    for spec in [region] if region is not None else _regions():
        known = facts(spec)
        found[known.spec] = check_region(known, here)
    own = check_machine(here)
    report: Callable[[list[Finding], dict[str, list[Finding]]], None]
    report = _print_json if as_json else _print
    report(own, found)
    return EXITS.get(worst([*own, *(one for findings in found.values() for one in findings)]), 0)


def _regions() -> list[str]:
    """Return the regions on this machine that carry a filesystem."""
    return [candidate.spec for candidate, _names in identified(discover(), identify)[0]]


def _print(own: list[Finding], found: dict[str, list[Finding]]) -> None:
    say(f"this machine, ivshmemfs {__version__}")
    show(list(as_rows(own)))
    for spec, findings in found.items():
        say("")
        say(spec)
        show(list(as_rows(findings)))
    if not found:
        say("")
        say("no region with a filesystem is here; see: ivshmemfs list")


def _print_json(own: list[Finding], found: dict[str, list[Finding]]) -> None:
    def shaped(findings: list[Finding]) -> list[dict[str, str]]:
        return [finding._asdict() for finding in findings]

    everything = [*own, *(one for findings in found.values() for one in findings)]
    say(
        json.dumps(
            {
                "version": __version__,
                "level": worst(everything),
                "machine": shaped(own),
                "regions": [
                    {"region": spec, "level": worst(findings), "findings": shaped(findings)}
                    for spec, findings in found.items()
                ],
            }
        )
    )


def _print_lines(region: str) -> int:
    known = facts(region)
    if known.unusable:
        raise RegionError(known.unusable)
    for line in lines(known):
        say(line)
    return 0
