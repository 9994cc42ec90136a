#!/usr/bin/python3 -I
"""Runs inside a guest: executes commands that the host sends over a virtio-serial port.

Requests and answers are lines of JSON.  A request is ``{"id", "argv", "stdin", "timeout"}``, its
answer ``{"id", "exit", "out", "err"}``; bytes travel as base64.  Requests run side by side, so a
long copy does not keep the host from asking something else.  ``exit`` is null when the time ran
out and the command was killed.

Run by the system's Python, without the project: it must work when the project does not.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

PORT_NAME = "ivshmemfs.agent"
SCRATCH = "/run/agent"


def find_port() -> str:
    """The device node of our port; there may be no udev to make links under its name."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        name = entry / "name"
        if name.exists() and name.read_text().strip() == PORT_NAME:
            return f"/dev/{entry.name}"
    raise SystemExit(f"no virtio-serial port is called {PORT_NAME}")


class Agent:
    def __init__(self, port: BinaryIO) -> None:
        self._port = port
        self._lock = threading.Lock()

    def send(self, answer: dict[str, Any]) -> None:
        line = memoryview(json.dumps(answer).encode() + b"\n")
        with self._lock:
            while line:
                line = line[self._port.write(line) :]

    def serve(self) -> None:
        self.send({"id": 0})
        for line in iter(self._port.readline, b""):
            threading.Thread(target=self._answer, args=(json.loads(line),)).start()

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            answer = run(request["argv"], base64.b64decode(request["stdin"]), request["timeout"])
        except OSError as error:
            answer = {"exit": 127, "out": "", "err": base64.b64encode(str(error).encode()).decode()}
        self.send({"id": request["id"], **answer})


def run(argv: list[str], stdin: bytes, timeout: float) -> dict[str, Any]:
    """Run one command; output goes through files, so that a daemon it leaves behind which
    inherited them does not keep the answer waiting."""
    with (
        tempfile.TemporaryFile(dir=SCRATCH) as source,
        tempfile.TemporaryFile(dir=SCRATCH) as out,
        tempfile.TemporaryFile(dir=SCRATCH) as err,
    ):
        source.write(stdin)
        source.seek(0)
        process = subprocess.Popen(
            argv, stdin=source, stdout=out, stderr=err, cwd="/", start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = None
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(base64.b64encode(file.read()).decode())
        return {"exit": status, "out": texts[0], "err": texts[1]}


def main() -> None:
    os.makedirs(SCRATCH, exist_ok=True)
    os.environ.update(TMPDIR=SCRATCH, HOME=SCRATCH, LC_ALL="C.UTF-8", PYTHONDONTWRITEBYTECODE="1")
    with open(find_port(), "r+b", buffering=0) as port:
        Agent(port).serve()


if __name__ == "__main__":
    main()
