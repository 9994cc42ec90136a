"""`python -m mkfs`"""

from mkfs.main import main

main(prog_name="mkfs.ivshmemfs")
