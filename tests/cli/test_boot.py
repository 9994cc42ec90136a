"""What docs/setup.md gives for a boot: lines for /etc/fstab, units, rules, and mount(8) itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support.mounts import TOP, run
from tests.support.roots import missing_beside, run_beside

GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")

UNITS = TOP / "packaging/systemd"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
BIN = Path(sys.executable).parent

needs_systemd = pytest.mark.skipif(
    not GENERATOR.exists() or shutil.which("systemd-analyze") is None,
    reason="systemd is not installed",
)
needs_namespace = pytest.mark.skipif(bool(missing_beside()), reason=missing_beside())


def blocks(kind: str) -> list[str]:
    """The fenced blocks of docs/setup.md of one kind."""
    text = (TOP / "docs/setup.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def documented() -> list[str]:
    """The lines of README and docs/setup.md that are for /etc/fstab."""
    text = (TOP / "README.md").read_text() + (TOP / "docs/setup.md").read_text()
    return [line for line in text.splitlines() if re.search(r"^\S+ +/\S+ +ivshmemfs ", line)]


# --- systemd ----------------------------------------------------------------------------------


def devices_waited_for(line: str, folder: Path) -> set[str]:
    """The device units that systemd starts before it mounts what a line of fstab says."""
    units = folder / "units"
    units.mkdir()
    (folder / "fstab").write_text(line + "\n")
    generated = run(
        GENERATOR, units, units, units,
        env={"SYSTEMD_FSTAB": str(folder / "fstab"), "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    assert generated.returncode == 0, generated.stderr
    made = list(units.glob("*.mount"))
    assert len(made) == 1
    for unit in UNITS.iterdir():
        shutil.copy(unit, units)
    checked = run(
        "systemd-analyze", "verify", "--man=no", *made, timeout=60,
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "SYSTEMD_LOG_LEVEL": "debug",
             "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    said = checked.stdout + checked.stderr
    assert f"{made[0].name}: Installed new job" in said, said[-2000:]
    assert "ordering cycle" not in said
    return set(re.findall(r"(\S+\.device): Installed new job", said))


def test_there_are_such_lines() -> None:
    assert len(documented()) >= 5
    assert {line.split()[0] for line in blocks("fstab")[2].splitlines()} >= {"pci"}


@needs_systemd
@pytest.mark.parametrize("line", documented())
def test_no_device_is_waited_for(line: str, tmp_path: Path) -> None:
    assert devices_waited_for(line, tmp_path) == set()


@needs_systemd
@pytest.mark.skipif(os.path.exists("/dev/none"), reason="a strange machine")
def test_that_a_path_below_dev_would_be_waited_for(tmp_path: Path) -> None:
    """So that the test above shows something."""
    waited = devices_waited_for("/dev/none /mnt/shared ivshmemfs defaults 0 0", tmp_path)
    assert waited == {"dev-none.device"}


def verified(*units: str, path: Path) -> str:
    """What systemd complains about in units, with the commands where an installation puts them."""
    done = run_beside(
        f"SYSTEMD_UNIT_PATH={path}: SYSTEMD_LOG_TARGET=console systemd-analyze verify --man=no "
        + " ".join(units)
    )
    return done.stdout + done.stderr if done.returncode else done.stderr


@needs_systemd
@needs_namespace
def test_the_units_are_sound(tmp_path: Path) -> None:
    units = [f"ivshmemfs{kind}@hello.service" for kind in ("-region", "", "-server")]
    assert verified(*units, path=UNITS) == ""
    shutil.copytree(UNITS, tmp_path / "wrong")
    for unit in (tmp_path / "wrong").iterdir():  # so that silence shows something
        unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=perhaps"))
    assert "restart specifier" in verified(*units, path=tmp_path / "wrong")


@needs_systemd
@needs_namespace
def test_the_mount_unit_is_sound(tmp_path: Path) -> None:
    (block,) = blocks("systemd-mount")
    shutil.copytree(UNITS, tmp_path / "units")
    (tmp_path / "units/mnt-shared.mount").write_text(block)
    assert verified("mnt-shared.mount", path=tmp_path / "units") == ""


def commands(unit: str, **variables: str) -> list[str]:
    """The ExecStart lines of a unit for the instance hello, their variables replaced."""
    text = (UNITS / unit).read_text()
    found = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    set_here = dict(re.findall(r"(\w+)=(\S+)", re.findall(r"^Environment=(.*)$", text, re.M)[0]))
    values = {"MKFS": ""} | {name: value.replace("%i", "hello") for name, value in set_here.items()}
    values |= variables
    return [
        re.sub(r"\$\{?(\w+)\}?", lambda name: values[name[1]], line.replace("%i", "hello"))
        for line in found
    ]


@needs_namespace
def test_what_the_units_run() -> None:
    """The commands of both units, twice: the second boot finds the region as it was left."""
    region = "; ".join(commands("ivshmemfs-region@.service", SIZE="1M", GROUP="daemon"))
    (mount,) = commands("ivshmemfs@.service")
    mount = mount.replace("mount -f ", "mount ")  # so that it returns
    done = run_beside(
        f"mkdir -p /mnt/hello; umask 7; {region}; stat -c '%a %G %s' /dev/shm/hello; {mount}; "
        f"echo kept >/mnt/hello/f; {region}; ivshmemfs umount /mnt/hello; {region}; {mount}; "
        "cat /mnt/hello/f; ivshmemfs umount /mnt/hello"
    )
    assert done.returncode == 0, done.stderr
    assert "formatted as ivshmemfs, label 'hello'" in done.stdout
    assert "660 daemon 1048576\n" in done.stdout
    assert done.stdout.count("left as it is") == 2
    assert done.stdout.endswith("\nkept\n")


@needs_namespace
def test_what_the_servers_unit_runs() -> None:
    (server,) = commands("ivshmemfs-server@.service", GROUP="daemon", VECTORS="2")
    region = "; ".join(commands("ivshmemfs-region@.service", SIZE="1M"))
    done = run_beside(
        f"mkdir -p /run/ivshmemfs; {region}; {server} & "
        "for n in $(seq 200); do [ -S /run/ivshmemfs/hello.sock ] && break; sleep 0.1; done; "
        "stat -c '%a %G %F' /run/ivshmemfs/hello.sock; sleep 0.5; kill $!; wait $!; echo ended $?"
    )
    assert "660 daemon socket\nended 0\n" in done.stdout, done.stderr
    assert "serving /dev/shm/hello, 1 MiB, vectors=2" in done.stderr


@needs_systemd
@needs_namespace
def test_directories_are_made(tmp_path: Path) -> None:
    rules = TOP / "packaging/tmpfiles.d/ivshmemfs.conf"
    made = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", rules)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mnt/shared").is_dir()
    assert (tmp_path / "etc/ivshmemfs").is_dir()


# --- mount(8) and fsck(8) -----------------------------------------------------------------------

#: Generic options of mount(8); `test_options.py` has each by itself.
GENERIC = (
    "defaults,rw,noauto,user,nofail,_netdev,relatime,nodiratime,lazytime,comment=x,x-gvfs-show,"
    "x-systemd.automount,x-systemd.requires=a.service,x-systemd.device-timeout=1,X-mount.mkdir"
)


@needs_namespace
def test_mount_8_with_a_line_of_fstab() -> None:
    done = run_beside(
        f"""
mkfs.ivshmemfs -q --size 1M -L hello -U 5d1f8c2e-6f0e-4c1c-9a55-7b7a3c0b4c11 /dev/shm/hello
for source in label=hello uuid=5d1f8c2e-6f0e-4c1c-9a55-7b7a3c0b4c11 file:/dev/shm/hello \
    /dev/shm/hello; do
    echo "$source /mnt/made/by/mount ivshmemfs {GENERIC} 0 0" >/tmp/fstab
    mount -T /tmp/fstab /mnt/made/by/mount
    echo works >/mnt/made/by/mount/f
    mount -o remount,ro /mnt/made/by/mount
    findmnt -no OPTIONS /mnt/made/by/mount | cut -d, -f1-3
    if echo fails 2>/dev/null >/mnt/made/by/mount/f; then exit 9; fi
    mount -o remount,rw,noatime /mnt/made/by/mount
    findmnt -no OPTIONS /mnt/made/by/mount | cut -d, -f1-5
    umount /mnt/made/by/mount
done
mount -t ivshmemfs -r -v -s -n label=hello /mnt/made/by/mount
cat /mnt/made/by/mount/f
umount /mnt/made/by/mount
mount -t fuse.ivshmemfs -o nofail /dev/shm/hello /mnt/made/by/mount
umount /mnt/made/by/mount
fsck -T -t ivshmemfs /dev/shm/hello
fsck -T -t ivshmemfs -a /dev/shm/hello
if mount -t ivshmemfs label=none /mnt/made/by/mount; then exit 9; fi
"""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ro,nosuid,nodev\n") == 4
    assert done.stdout.count("rw,nosuid,nodev,noexec,noatime\n") == 4
    assert "\nworks\n" in done.stdout
    assert done.stdout.count("/dev/shm/hello: clean") == 2
    assert done.stderr == "ivshmemfs: no region is label=none; see: ivshmemfs list\n"


@needs_namespace
def test_mount_8_keeps_upper_case_names_for_itself() -> None:
    """So fstab has `label=`; the command takes both."""
    done = run_beside(
        "mkfs.ivshmemfs -q --size 1M -L hello /dev/shm/hello; "
        "mkdir /mnt/a; cd /mnt; mount -t ivshmemfs LABEL=hello /mnt/a || "
        "ivshmemfs mount LABEL=hello /mnt/a; umount /mnt/a"
    )
    assert done.returncode == 0
    assert "can't find LABEL=hello" in done.stderr


# --- rules of others ------------------------------------------------------------------------------


@needs_namespace
@pytest.mark.skipif(shutil.which("udevadm") is None, reason="udev is not installed")
@pytest.mark.parametrize("wrong", [False, True])
def test_the_udev_rule_is_read(wrong: bool, tmp_path: Path) -> None:
    rule = (TOP / "packaging/udev/60-ivshmemfs.rules").read_text()
    (tmp_path / "60-ivshmemfs.rules").write_text(rule.replace("RUN+", "RNU+") if wrong else rule)
    done = run_beside(
        f"mount -t tmpfs none /run; mkdir -p /run/udev/rules.d; cp {tmp_path}/*.rules "
        "/run/udev/rules.d/; udevadm test /sys/class/mem/null 2>&1 | grep ivshmemfs.rules:"
    )
    said = [line for line in done.stdout.splitlines() if "Unknown group" not in line]
    assert bool(said) is wrong, said


@pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="apparmor is not installed")
def test_the_line_for_apparmor(tmp_path: Path) -> None:
    (line,) = blocks("apparmor")
    profile = tmp_path / "profile"
    for text, code in ((line, 0), (line.replace(",", ""), 1)):
        profile.write_text(f"profile guest /bin/true {{\n{text}\n}}\n")
        done = subprocess.run(
            ["apparmor_parser", "-Q", "-K", profile], capture_output=True, check=False, timeout=60
        )
        assert done.returncode == code, done.stderr


def test_the_xml_for_libvirt() -> None:
    (text,) = blocks("xml")
    shmem = ET.fromstring(text).find("shmem")
    assert shmem is not None
    model, size = shmem.find("model"), shmem.find("size")
    assert model is not None
    assert size is not None
    assert (shmem.get("name"), model.get("type"), size.text) == ("hello", "ivshmem-plain", "64")


@pytest.mark.skipif(
    not SCHEMA.exists() or shutil.which("xmllint") is None,
    reason="libvirt's schemas or xmllint are not installed",
)
def test_the_xml_is_valid_for_libvirt(tmp_path: Path) -> None:
    (text,) = blocks("xml")
    head = "<domain type='kvm'><name>g</name><memory unit='MiB'>512</memory>"
    head += "<os><type arch='x86_64'>hvm</type></os>"
    for devices, code in ((text, 0), (text.replace("-plain", "-plane"), 3)):
        (tmp_path / "guest.xml").write_text(f"{head}{devices}</domain>")
        done = run("xmllint", "--noout", "--relaxng", SCHEMA, tmp_path / "guest.xml")
        assert done.returncode == code, done.stderr
