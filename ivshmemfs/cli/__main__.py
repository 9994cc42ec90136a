"""`python -m ivshmemfs.cli`"""

from ivshmemfs.__main__ import ivshmemfs

ivshmemfs()
