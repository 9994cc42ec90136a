"""The old name of ivshmemfs.native, until all imports have moved."""

from ivshmemfs.native import *  # noqa: F403
from ivshmemfs.native._native import _crc32c_by_table as _crc32c_by_table
