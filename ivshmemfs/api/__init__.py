"""The Python API: files of a region without a mount and without FUSE.

- ``opening``: `open` finds the region and joins its peers
- ``client``: `Client`, the operations on paths
- ``file``: open files, as the module `io` has them
- ``session``: the peer behind a client: its lock, its retries, its upkeep and its end
- ``signals``: signals wait while a call of the engine runs; ``closing``: what a `with` closes
- ``walk``: paths; ``locks``: locks between machines; ``watching``: what any machine changes
- ``kv``: a directory as a key-value store
- ``mapped_file``: a fixed file as memory of programs; ``messages``: a queue of records in one
- ``fsspec_adapter``: the same for programs that use fsspec

Every failure is an OSError with errno and filename.  Its ``__cause__`` is the error of the layer
below.  Misuse raises what the standard library raises: ValueError, TypeError, RuntimeError.
"""

from ivshmemfs.api.client import Client, DirEntry
from ivshmemfs.api.kv import Item, KeyValue
from ivshmemfs.api.locks import FileLock
from ivshmemfs.api.mapped_file import MappedFile
from ivshmemfs.api.messages import Queue
from ivshmemfs.api.opening import open
from ivshmemfs.api.watching import Change, Watch

__all__ = [
    "Change", "Client", "DirEntry", "FileLock", "Item", "KeyValue", "MappedFile", "Queue", "Watch",
    "open",
]  # fmt: skip
