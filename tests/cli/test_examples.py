"""Every example of every --help, typed by a shell on a machine where ivshmemfs is installed.

Each command gets a machine of its own (tests/support/roots.py), each example a region of its own.
There is no device here, so `pci` becomes `label=hello`; tests/guest uses devices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.cli.manuals import NAMES, manual
from tests.support.mounts import TOP
from tests.support.roots import missing_beside, run_beside

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_beside()), reason=missing_beside()),
]

#: What the examples speak of: files in the current directory, and in the region.
FILES = """
mkdir -p /mnt/shared /mnt/home /mnt/bin; cd /mnt/home
printf 'pdf\\n' >report.pdf; mkdir src include backup inbox done
echo 'an error' >log.1; cp log.1 log.2; cp log.1 notes.txt; cp log.1 src/a.c
tar -cf src.tar src; cp report.pdf new
printf '#!/bin/sh\\necho did "$0" "$@"\\n' >/mnt/bin/make
chmod +x /mnt/bin/make; cp /mnt/bin/make /mnt/bin/backup
PATH=/mnt/bin:$PATH
"""
REGION = """
mkfs.ivshmemfs -q --size 4M --label hello /dev/shm/hello
ivshmemfs put -r /dev/shm/hello log.1 log.2 notes.txt src.tar report.pdf new inbox done backup /
"""
MOUNT = "ivshmemfs mount /dev/shm/hello /mnt/shared\n"
#: What has to be there in place of a region that is not mounted; by the first words.
BEFORE = {
    "mkfs.ivshmemfs --size": "",
    "ivshmemfs mkdir /dev/shm/hello:/inbox": REGION + "ivshmemfs rm -r /dev/shm/hello:/inbox",
    "ivshmemfs mkdir -p": REGION,
    "ivshmemfs uuid /dev/shm/copy": REGION + "cp /dev/shm/hello /dev/shm/copy",
    "ivshmemfs mv --force": REGION + "cp new old; ivshmemfs put label=hello old /",
    "ivshmemfs mv label=hello:/a": REGION + "cp new a; cp new b; ivshmemfs put label=hello a b /",
    "ivshmemfs get -r": REGION + "mkdir -p /srv",
    "ivshmemfs put /dev/shm/hello report.pdf": REGION + "ivshmemfs rm label=hello:/report.pdf",
    "tar -c": REGION + "ivshmemfs rm label=hello:/src.tar",
    "ivshmemfs get /dev/shm/hello /report.pdf": REGION + "rm report.pdf",
    "ivshmemfs mount": REGION,
    "ivshmemfs umount": REGION + MOUNT,
    "ivshmemfs map": REGION + "ivshmemfs map --create 1M label=hello:/counters\n" + MOUNT,
    "ivshmemfs map --create": REGION + MOUNT,
    "ivshmemfs receive": REGION + MOUNT + "seq 100 | ivshmemfs send /mnt/shared/jobs\n",
    "ivshmemfs receive -f": REGION + "ivshmemfs send label=hello:/news text\n",
    "ivshmemfs top": REGION + MOUNT,
    "ivshmemfs wait --timeout": REGION + MOUNT + "(sleep 0.5; echo made >/mnt/shared/result) &",
    "ivshmemfs watch -r": REGION
    + MOUNT
    + "(while sleep 0.2; do mkdir /mnt/shared/d; rmdir /mnt/shared/d; done) &",
    "ivshmemfs watch --json": REGION
    + "(while sleep 0.2; do ivshmemfs put -q --force label=hello log.1 /inbox; done) &",
}
#: What goes on until it is interrupted, and the exit code then.
ENDLESS = {
    "ivshmemfs top": 0,
    "ivshmemfs top --json -d 5 label=hello": 0,
    "ivshmemfs watch -r /mnt/shared": 8,
    "ivshmemfs watch --json label=hello:/inbox": 8,
    "ivshmemfs server /run/hello.sock /dev/shm/hello": 0,
    "ivshmemfs receive -f label=hello:/news": 8,
}
#: Interrupts a command once it has printed something; timeout(1) undoes that a shell lets what
#: runs in the background ignore SIGINT.
INTERRUPTED = """timeout --foreground --preserve-status -s INT 100 {line} >said 2>&1 &
until [ -s said ]; do kill -0 $! || break; sleep 0.1; done
kill -INT $!
wait $!"""
#: What this machine has no device, peer or group for; what is said instead.
REFUSED = {
    "ivshmemfs mount /mnt/shared": "there is no ivshmem device here: name the region",
    "ivshmemfs evict": "slot 3",
    "ivshmemfs server --group": "there is no group libvirt-qemu here",
    "mkfs.ivshmemfs label=hello": "already carries an ivshmemfs filesystem",
}


def entry(line: str, table: Mapping[str, object]) -> str | None:
    """The longest key of a table that a line begins with."""
    return max((key for key in table if line.startswith(key)), key=len, default=None)


def lines() -> list[tuple[str, str]]:
    found = [(name, line) for name in NAMES for line, _purpose in manual(name).examples]
    return [(name, re.sub(r"\bpci\b(?!\.prom)", "label=hello", line)) for name, line in found]


@pytest.mark.parametrize(("name", "line"), lines())
def test_an_example_does_what_it_says(name: str, line: str) -> None:
    key = entry(line, BEFORE)
    before = BEFORE[key] if key else REGION + (MOUNT if "/mnt/shared" in line else "")
    typed = INTERRUPTED.replace("{line}", line) if line in ENDLESS else line
    done = run_beside(f"{FILES}{before}\nset +e\n{typed}\necho exit $?")
    *_, last = done.stdout.splitlines()
    refused = entry(line, REFUSED)
    if refused is None:
        assert last == f"exit {ENDLESS.get(line, 0)}", done.stdout + done.stderr
    else:
        assert last in ("exit 1", "exit 32"), done.stdout
        assert REFUSED[refused] in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def block(page: str, heading: str) -> str:
    """The first block of shell text below a heading."""
    text = (TOP / page).read_text().split(f"\n{heading}\n", 1)[1]
    first: str = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    return first


def test_the_readme_s_commands_for_a_host_work() -> None:
    host = block("README.md", "### On the host")
    doctor = block("README.md", "### When something does not work")
    script = host.replace("ivshmemfs umount", doctor + "ivshmemfs umount")
    done = run_beside(f"{FILES}{script}\nls /dev/shm")
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"^fail ", done.stdout, re.MULTILINE)
    assert "<shmem name=" in done.stdout
    assert done.stdout.splitlines()[-1] != "hello"


def test_setup_s_commands_for_mounting_work() -> None:
    made = block("docs/setup.md", "## 2. The region, on the host")
    mounts = block("docs/setup.md", "## 4. Mount").splitlines()
    there = [line for line in mounts if "label=" in line]
    assert len(there) == 2
    for line in there:
        done = run_beside(
            f"mkdir -p /mnt/shared\n{made}{line}\necho text >/mnt/shared/f; "
            "ivshmemfs cat label=hello:/f; ivshmemfs umount /mnt/shared"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("text\n")
