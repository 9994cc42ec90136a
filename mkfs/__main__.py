"""`mkfs.ivshmemfs` and `python -m mkfs`"""

import sys

from ivshmemfs.errors import UnfitMachine

NAME = "mkfs.ivshmemfs"


def main() -> None:
    """Entry point; imports the rest where it can say in one line that this machine is unfit."""
    try:
        from mkfs.main import main as run
    except UnfitMachine as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(1)
    run(prog_name=NAME)


if __name__ == "__main__":
    main()
