"""`fsck.ivshmemfs` and `python -m ivshmemfs.fsck`"""

import sys

from ivshmemfs.errors import UnfitMachine

NAME = "fsck.ivshmemfs"


def main() -> None:
    """Entry point; imports the rest where it can say in one line that this machine is unfit."""
    try:
        from ivshmemfs.fsck.main import main as run
    except UnfitMachine as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(8)
    run(prog_name=NAME)


if __name__ == "__main__":
    main()
