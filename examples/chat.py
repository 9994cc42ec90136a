"""Talk between machines: every line that is typed on one is shown on all others.

    python chat.py REGION NAME

REGION is a path on the host and "pci" in a guest.  A newcomer sees the last lines first.
"""

import sys
import threading

import ivshmemfs


def show(lines: ivshmemfs.Queue, name: bytes) -> None:
    """Print what others say, until the program ends."""
    lost = 0
    for line in lines:
        if lines.lost > lost:
            print(f"... {lines.lost - lost} lines were too fast for this reader ...", flush=True)
            lost = lines.lost
        if not line.startswith(name + b": "):
            text = line.decode(errors="replace")
            # A record is data of another machine: nothing in it may steer this terminal.
            safe = (mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)
            print("".join(safe), flush=True)


def main(region: str, name: str) -> None:
    """Send each line of the standard input."""
    prefix = name.encode()
    with (
        ivshmemfs.open(region) as fs,
        fs.queue("/chat", records=64, record_size=1000, broadcast=True, replay=True) as lines,
    ):
        threading.Thread(target=show, args=(lines, prefix), daemon=True).start()
        for line in sys.stdin.buffer:
            lines.put((prefix + b": " + line.rstrip(b"\n"))[: lines.record_size])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: chat.py REGION NAME")
    main(*sys.argv[1:])
