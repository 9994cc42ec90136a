"""`python -m ivshmemfs.fsck`"""

from ivshmemfs.__main__ import fsck

fsck()
