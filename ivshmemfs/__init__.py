"""A filesystem in memory that several machines share.

`ivshmemfs.open` gives a program the files of a region without a mount: see docs/api.md.  Nothing of
it is loaded before its first use.
"""

TYPE_CHECKING = False  # as in the module typing, which every command would wait for

if TYPE_CHECKING:
    from ivshmemfs.api import Change as Change
    from ivshmemfs.api import Client as Client
    from ivshmemfs.api import DirEntry as DirEntry
    from ivshmemfs.api import FileLock as FileLock
    from ivshmemfs.api import Item as Item
    from ivshmemfs.api import KeyValue as KeyValue
    from ivshmemfs.api import MappedFile as MappedFile
    from ivshmemfs.api import Queue as Queue
    from ivshmemfs.api import Watch as Watch
    from ivshmemfs.api import open as open

#: The one place of the version: pyproject.toml reads it here.
__version__ = "0.1.0"

_API = (
    "Change", "Client", "DirEntry", "FileLock", "Item", "KeyValue", "MappedFile", "Queue", "Watch",
    "open",
)  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _API:
        raise AttributeError(f"module 'ivshmemfs' has no attribute {name!r}")
    from ivshmemfs import api

    value: object = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_API]
