"""A QEMU guest over this machine's own file tree, and commands run in it.

virtme-ng knows how to boot a stock kernel with the host's root file system, read-only over 9p.  It
is asked once for the command line and the initramfs (`VirtmeRecipe`).  ARM64 guests run from an
initramfs that `scripts/aarch64-check` makes (`ArmRecipe`).  Starting QEMU ourselves means
that its pid is known: tests stop, resume and kill it, and it dies with the test run, however that
ends.  There is no network device.  What tests exchange goes through the ivshmem device alone; only
commands and their output travel over a virtio-serial port (see ``agent.py``).

State: a `Guest` is running from `start` to `close` or `kill`; a killed one can be started again.
All waiting is bounded; the last lines of the guest's console are part of every failure.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Protocol

from tests.guest.agent import PORT_NAME

BOOT_SECONDS = 240.0
COMMAND_SECONDS = 300.0  # Python starts thirty times slower without KVM
BIN = Path(sys.executable).parent
AGENT = Path(__file__).with_name("agent.py").resolve()
INIT = Path(__file__).resolve().parents[2] / "scripts/guest-init"
_PR_SET_PDEATHSIG = 1
# Not one.  With a single virtual CPU, QEMU's emulation (TCG) leaves out the atomicity of the
# guest's atomic instructions, because no other CPU could look.  Then guest and host lost a million
# of a billion increments by compare-and-swap; with two virtual CPUs they lost none.
_CPUS = "2"
_SLOT = 0x10  # on the guest's PCI bus; the regions follow each other
_NAME = "NAME-OF-GUEST"


def kernel_root() -> Path:
    """Where ``scripts/setup --guest`` unpacked the guest's kernel and modules."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("IVSHMEMFS_CACHE") or Path(caches) / "ivshmemfs") / "guest/current"


def arm_parts() -> Path | None:
    """Where ``scripts/aarch64-check`` keeps its parts, when guests are to be ARM64 machines."""
    place = os.environ.get("IVSHMEMFS_TEST_AARCH64")
    return Path(place) if place else None


def kvm_works() -> bool:
    """Whether QEMU can leave the guest's instructions to the processor.

    A /dev/kvm alone says little.  Without the processor's own support it serves only guests that
    were made for that, and a stock kernel hangs in it.  IVSHMEMFS_TEST_KVM=0 or 1 decides instead.
    """
    if said := os.environ.get("IVSHMEMFS_TEST_KVM"):
        return said != "0"
    words = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in words or "svm" in words) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def missing_parts() -> str | None:
    """What a guest needs and this machine lacks, or None."""
    if arm := arm_parts():
        return None if (arm / "guest-initramfs").exists() else f"there is no ARM64 guest in {arm}"
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed"
    if not (BIN / "virtme-run").exists():
        return f"virtme-ng is not installed in {BIN.parent}"
    if not (kernel_root() / "boot").is_dir():
        return f"there is no kernel in {kernel_root()}"
    return None


class GuestError(AssertionError):
    """The guest did not do what it must: it did not boot, or a command failed or hung."""


@dataclass(frozen=True)
class Completed:
    """A command that ended: exit status (None when it was killed for its time) and output."""

    argv: Sequence[str]
    exit: int | None
    out: str
    err: str

    def check(self) -> Completed:
        """Self when the command succeeded; GuestError otherwise."""
        if self.exit != 0:
            text = f"{shlex.join(self.argv)}: exit {self.exit}\n{self.out}{self.err}"
            raise GuestError(text)
        return self


class Recipe(Protocol):
    """How to boot, made once for all guests."""

    def command(self, name: str) -> list[str]:
        """The QEMU command line of a guest of this name, still without its devices."""
        ...


class VirtmeRecipe:
    """virtme-ng's QEMU command line and initramfs."""

    def __init__(self, directory: Path) -> None:
        kernel = next((kernel_root() / "boot").glob("vmlinuz-*")).resolve()
        self.modules = kernel.parent.parent  # as modprobe -d takes it, also in the guest
        self.initramfs = directory / "initramfs"
        made = subprocess.run(
            [str(BIN / "virtme-run"), "--kimg", str(kernel), "--mods=auto", "--force-9p",
             "--memory", "1G", "--cpus", _CPUS, "--name", _NAME,
             *([] if kvm_works() else ["--disable-kvm"]),
             "--show-boot-console", "--script-sh", "true",
             "--kopt", f"task={AGENT}", "--kopt", f"modules={self.modules}",
             "--kopt", "no_timer_check",  # an emulated timer may be late on a busy machine
             "--dry-run", "--show-command", "--save-initramfs", str(self.initramfs)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(directory)},
        )  # fmt: skip
        if made.returncode:
            raise GuestError(f"virtme-run failed: {made.stderr}")
        argv = shlex.split(made.stdout.splitlines()[-1])
        self._argv = [re.sub(r"\binit=\S+", f"init={INIT}", word) for word in argv]

    def command(self, name: str) -> list[str]:
        """The QEMU command line of a guest of this name, still without its devices."""
        return [word.replace(_NAME, name) for word in self._argv]


class ArmRecipe:
    """An ARM64 machine, emulated; `directory` is seen in it under its own name."""

    def __init__(self, parts: Path, directory: Path) -> None:
        self._parts = parts
        self._directory = directory

    def command(self, name: str) -> list[str]:
        """The QEMU command line of a guest of this name, still without its devices."""
        qemu = self._parts / "qemu/usr"
        kernel = next((self._parts / "kernel/boot").glob("vmlinuz-*"))
        words = f"hostname={name} agent={AGENT} workplace={self._directory}"
        cpu = os.environ.get("IVSHMEMFS_AARCH64_CPU", "max,pauth-impdef=on")
        share = f"local,path={self._directory},mount_tag=workplace,security_model=none,readonly=on"
        return [
            str(qemu / "bin/qemu-system-aarch64"),
            *("-L", str(qemu / "share/qemu"), "-L", "/usr/share/qemu", "-L", "/usr/share/seabios"),
            *("-machine", "virt", "-cpu", cpu, "-smp", _CPUS, "-m", "1G"),
            *("-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio", "-virtfs", share),
            *("-kernel", str(kernel), "-initrd", str(self._parts / "guest-initramfs")),
            *("-append", f"console=ttyAMA0 panic=-1 {words}"),
        ]


def make_recipe(directory: Path) -> Recipe:
    """The recipe for the machines that this run is about; `directory` is for its files."""
    arm = arm_parts()
    return VirtmeRecipe(directory) if arm is None else ArmRecipe(arm, directory)


class Pending:
    """A command that runs in the guest."""

    def __init__(self, guest: Guest, argv: Sequence[str], timeout: float) -> None:
        self.argv = argv
        self._guest = guest
        self._deadline = time.monotonic() + timeout + 30
        self.answer: Queue[dict[str, Any] | None] = Queue()

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return not self.answer.empty()

    def wait(self) -> Completed:
        """The result; GuestError when the guest died or does not answer."""
        try:
            answer = self.answer.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except Empty:
            answer = None
        if answer is None:
            raise GuestError(f"{shlex.join(self.argv)}: no answer\n{self._guest.console()}")
        out, err = (base64.b64decode(answer.get(key, "")).decode() for key in ("out", "err"))
        return Completed(self.argv, answer.get("exit"), out, err)


class Guest:
    """One virtual machine with an ivshmem-plain device for each of ``regions`` (host files).

    ``devices`` are more words for QEMU's command line.  A ``modest`` one runs at low priority.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        regions: Sequence[Path],
        directory: Path,
        devices: Sequence[str] = (),
        modest: bool = True,
    ) -> None:
        self.name = name
        self._more_devices = devices
        self._modest = modest
        self.regions = regions
        self.failed_to_boot = False
        self._recipe = recipe
        self._directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=directory))
        self._qemu: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._hello: Pending | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._lock = threading.Lock()

    # --- life ---------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether QEMU is there (perhaps stopped)."""
        return self._qemu is not None and self._qemu.poll() is None

    def start(self) -> None:
        """Start QEMU; `wait_ready` waits for it to boot, so that several can boot at once.

        Called in the main thread: the kernel ends QEMU with the thread that started it.
        """
        self.close()
        argv = [*self._recipe.command(self.name), *self._devices()]
        with open(self._directory / "console", "ab") as console:
            self._qemu = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=_modest_child if self._modest else dies_with_parent,
            )
        self._hello = self._pending[0] = Pending(self, ["boot"], BOOT_SECONDS)
        self._socket = self._connect("agent")
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    def _devices(self) -> Iterator[str]:
        # As libvirt does; the same again when the guest is started again.
        yield from ("-uuid", str(uuid.uuid5(uuid.NAMESPACE_OID, str(self._directory))))
        yield from self._more_devices
        yield from ("-device", "virtio-serial")
        yield from ("-chardev", f"socket,id=agent,path={self._path('agent')},server=on,wait=off")
        yield from ("-device", f"virtserialport,chardev=agent,name={PORT_NAME}")
        yield from ("-qmp", f"unix:{self._path('qmp')},server=on,wait=off")
        for index, path in enumerate(self.regions):
            size = path.stat().st_size
            backend = f"memory-backend-file,id=region{index},share=on,mem-path={path},size={size}"
            yield from ("-object", backend)
            yield from ("-device", f"ivshmem-plain,memdev=region{index},addr={_SLOT + index:#x}")

    def device(self, index: int) -> str:
        """The region of this number as the commands in the guest name it."""
        return f"pci:0000:00:{_SLOT + index:02x}.0"

    def bar(self, index: int) -> str:
        """The directory in sysfs of this region's device."""
        return "/sys/bus/pci/devices/" + self.device(index).removeprefix("pci:")

    def _path(self, name: str) -> Path:
        return self._directory / name

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.running:
            client = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                client.connect(str(self._path(name)))
                return client
            client.close()
            time.sleep(0.05)
        raise GuestError(f"{self.name}: QEMU did not start\n{self.console()}")

    def wait_ready(self) -> None:
        """Wait until commands can be run; GuestError when it does not boot."""
        if self._hello is not None:
            self.failed_to_boot = True
            self._hello.wait()
            self.failed_to_boot = False
            self._hello = None

    def pause(self) -> None:
        """Stop QEMU between any two instructions of its guest (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused QEMU go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End QEMU at once (SIGKILL), as when the host loses the machine."""
        if self.running:
            self._signal(signal.SIGKILL)
        if self._qemu is not None:
            self._qemu.wait(30)

    def close(self) -> None:
        """End the guest, if there is one, and everything that waits for it."""
        self.kill()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._fail_pending()

    def _signal(self, number: int) -> None:
        assert self._qemu is not None
        os.kill(self._qemu.pid, number)

    def qmp(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run one QMP command, such as "stop" and "cont", and return its answer."""
        with self._connect("qmp") as client, client.makefile("rw") as stream:
            client.settimeout(30)
            stream.readline()
            for word, given in (("qmp_capabilities", {}), (command, arguments)):
                stream.write(json.dumps({"execute": word, "arguments": given}) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline())
                while "event" in answer:
                    answer = json.loads(stream.readline())
                if "error" in answer:
                    raise GuestError(f"QMP {word}: {answer}")
            return answer

    # --- commands -----------------------------------------------------------------------------

    def begin(
        self, *argv: str | Path, stdin: bytes = b"", timeout: float = COMMAND_SECONDS
    ) -> Pending:
        """Begin a command as root and return at once."""
        words = [str(word) for word in argv]
        request: dict[str, Any] = {
            "argv": words,
            "stdin": base64.b64encode(stdin).decode(),
            "timeout": timeout,
        }
        pending = Pending(self, words, timeout)
        with self._lock:
            request["id"] = number = next(self._ids)
            self._pending[number] = pending
            if self._socket is None or not self.running:
                raise GuestError(f"{self.name} is not running")
            with contextlib.suppress(BrokenPipeError):  # then the listener fails it
                self._socket.sendall(json.dumps(request).encode() + b"\n")
        return pending

    def run(
        self, *argv: str | Path, stdin: bytes = b"", timeout: float = COMMAND_SECONDS
    ) -> Completed:
        """Run a command as root and wait for its end; its exit status is not looked at."""
        return self.begin(*argv, stdin=stdin, timeout=timeout).wait()

    def sh(self, script: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run shell text and return what it printed; GuestError when it fails."""
        return self.run("/bin/sh", "-euc", script, timeout=timeout).check().out

    def console(self) -> str:
        """The last lines of the guest's console."""
        text = (self._directory / "console").read_text(errors="replace")
        return "\n".join(text.splitlines()[-25:])

    def _listen(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as stream:
            for line in stream:
                answer = json.loads(line)
                with self._lock:
                    pending = self._pending.pop(answer["id"], None)
                if pending is not None:
                    pending.answer.put(answer)
        self._fail_pending()

    def _fail_pending(self) -> None:
        with self._lock:
            lost, self._pending = list(self._pending.values()), {}
        for pending in lost:
            pending.answer.put(None)


def dies_with_parent() -> None:
    """In a child before its program starts: it is killed when the thread that made it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _modest_child() -> None:
    """In the child before QEMU starts: low priority, and gone when the test run is gone."""
    os.nice(10)
    dies_with_parent()
