"""The lines that give a region to a guest and mount it at boot; `doctor --qemu` prints them."""

from __future__ import annotations

import os
import re
import shlex

from ivshmemfs.cli.doctor.facts import Facts
from ivshmemfs.region import exact_size

_MIB = 1 << 20
_SHM = "/dev/shm/"


def lines(facts: Facts) -> list[str]:
    """Return the lines for a region, each part under a comment; in a guest those of the guest."""
    parts: list[str] = []
    if facts.file is not None:
        path = facts.file.path
        parts += [
            "# QEMU: add to its command line", *_qemu(path, facts.size), "",
            "# libvirt: add inside <devices> ('virsh edit GUEST')", *_libvirt(path, facts.size), "",
            "# /etc/fstab on this host", _fstab(f"file:{path}", facts, _after(path)), "",
        ]  # fmt: skip
    return [
        *parts,
        "# /etc/fstab in a guest", _fstab(_guest_spec(facts), facts), "",
        "# /etc/udev/rules.d/70-ivshmemfs.rules in a guest: the group ivshmem may use the device",
        *_udev(),
    ]  # fmt: skip


def _qemu(path: str, size: int) -> list[str]:
    backend = f"memory-backend-file,id=ivshmem,share=on,mem-path={path.replace(',', ',,')}"
    return [
        f"-object {shlex.quote(f'{backend},size={exact_size(size)}')} \\",
        "-device ivshmem-plain,memdev=ivshmem",
    ]


def _libvirt(path: str, size: int) -> list[str]:
    from xml.sax.saxutils import quoteattr  # loads an HTTP client

    name = path.removeprefix(_SHM)
    if not path.startswith(_SHM) or "/" in name:
        return [f"<!-- libvirt takes only files in {_SHM}: move the region there -->"]
    if size % _MIB:
        return ["<!-- libvirt takes whole MiB only: make the region larger -->"]
    return [
        f"<shmem name={quoteattr(name)}>",
        "  <model type='ivshmem-plain'/>",
        f"  <size unit='M'>{size // _MIB}</size>",
        "</shmem>",
    ]


def _guest_spec(facts: Facts) -> str:
    if facts.label and "=" not in facts.label:
        return f"label={facts.label}"
    return f"uuid={facts.uuid}" if facts.uuid else "pci"


def _after(path: str) -> str:
    """Return the option with which systemd mounts after the unit that may make the region."""
    name = path.removeprefix(_SHM)
    if not path.startswith(_SHM) or not re.fullmatch(r"[A-Za-z0-9:_.][A-Za-z0-9:_.-]*", name):
        return ""
    return f",x-systemd.after=ivshmemfs-region@{name}.service"


def _fstab(spec: str, facts: Facts, more: str = "") -> str:
    name = facts.label or (os.path.basename(facts.file.path) if facts.file else "shared")
    place = "/mnt/" + (re.sub(r"[^\w.-]", "-", name, flags=re.ASCII).lstrip(".") or "shared")
    return f"{_fstab_field(spec)}  {place}  ivshmemfs  nofail{more}  0 0"


def _fstab_field(text: str) -> str:
    """Return a field with blanks, tabs, newlines, backslashes and # as fstab(5) writes them."""
    return re.sub(r"[ \t\n\\#]", lambda found: f"\\{ord(found[0]):03o}", text)


def _udev() -> list[str]:
    match = 'ACTION=="add", SUBSYSTEM=="pci", ATTR{vendor}=="0x1af4", ATTR{device}=="0x1110"'
    files = "/sys%p/resource2 /sys%p/resource2_wc"
    run = f"chgrp ivshmem {files}; chmod g+rw {files}; echo 1 >/sys%p/enable"
    return [f"{match}, RUN+=\"/bin/sh -c '{run}'\""]
