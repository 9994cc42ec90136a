"""Which machine the figures are from: without it, those of two runs cannot be compared.

A ratio to the C passthrough moves with the machine.  An interpreter needs more memory and more page
faults than C, so it loses more where these are dear.  The costs of an empty system call and of a
fresh page tell such machines apart.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TypedDict

from bench.runner import LocalClient

CPUINFO = Path("/proc/cpuinfo")
#: Timed calls; one sample is a batch of 100.
BATCHES = 2000


class Machine(TypedDict):
    """What a document of figures keeps of its machine; times in nanoseconds."""

    cpus: int
    machine: str  # x86_64, aarch64
    cpu: str  # the model as the kernel names it; "" where it names none
    guest: bool  # a hypervisor runs below
    kernel: str
    python: str
    empty_call: float
    fresh_page: float


def describe(client: LocalClient, work: Path) -> Machine:
    """Look at this machine, and time an empty system call and the first store to a page."""
    costs = client.run(work, "machine", BATCHES)
    cpu, guest = processor(CPUINFO.read_text())
    return {
        "cpus": os.cpu_count() or 1,
        "machine": platform.machine(),
        "cpu": cpu,
        "guest": guest,
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "empty_call": round(costs["empty-call"].p50 * 1e9 / 100, 1),
        "fresh_page": round(costs["fresh-page"].p50 * 1e9 / 100, 1),
    }


def processor(cpuinfo: str) -> tuple[str, bool]:
    """The model, and whether a hypervisor says that it is there.  (ARM64 tells neither.)"""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _colon, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", ""), "hypervisor" in fields.get("flags", "").split()


def sentence(machine: Machine) -> str:
    """One line for people: at the top of a run and above the figures of a page."""
    cpu = f"{machine['cpu']}, " if machine.get("cpu") else ""
    kind = "a virtual machine with " if machine.get("guest") else ""
    line = (
        f"Measured on {kind}{machine['cpus']} CPUs ({cpu}{machine['machine']}), "
        f"Linux {machine['kernel']}, Python {machine['python']}."
    )
    if "empty_call" not in machine:  # figures of an earlier version
        return line
    call, page = machine["empty_call"], machine["fresh_page"]
    return f"{line} An empty system call takes {call:.0f} ns, the first store to a page {page:.0f}."
