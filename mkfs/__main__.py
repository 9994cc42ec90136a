"""`python -m mkfs`"""

from ivshmemfs.__main__ import mkfs

mkfs()
