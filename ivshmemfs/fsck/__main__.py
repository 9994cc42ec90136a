"""`python -m ivshmemfs.fsck`"""

from ivshmemfs.fsck.main import main

main(prog_name="fsck.ivshmemfs")
