"""A directory of a region as a store of values by key.

Each value is a plain file, so a mount shows it, and what a mount writes is a value.  Each `get` is
one look and each `set` one commit.  When `set` has returned, every `get` of any machine that starts
later returns the new value.

A key becomes a name byte by byte.  A slash, a NUL, a percent sign, the bytes of a control character
and a leading dot become %XX.  Other names, such as "100%", are not keys.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ivshmemfs.api import walk
from ivshmemfs.engine import contents, names
from ivshmemfs.errors import FsError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.transaction import Transaction, View

Key = str | bytes
T = TypeVar("T")
K = TypeVar("K", str, bytes)

#: Bytes of a value at most, and of all values of one `set_many`: what one commit stores.
VALUE_MAX = contents.MOST
#: Values of one `set_many` at most; other peers wait for the commit, about 50 ms for so many.
BATCH_MAX = 1000
#: The extended attribute that keeps an item's note.
NOTE = b"user.ivshmemfs.note"

_ESCAPED = re.compile(rb"[\x00-\x1f\x7f/%]|^\.")
_PLAIN = re.compile(rb"[^\x00-\x1f\x7f/%.][^\x00-\x1f\x7f/%]*").fullmatch  # nothing to escape
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")


class Item(NamedTuple):
    """A value, the note beside it, and a version that changes with every change."""

    value: bytes
    note: bytes = b""
    version: int = 0


class _Refused(Exception):
    """The program's own function raised `error`, which tells nothing of the region."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def name_of(key: Key) -> bytes:
    """Return the file name of a key; raises ValueError for an empty key.

    The name may be too long: then every use of the key raises OSError ENAMETOOLONG.
    """
    raw = key if type(key) is bytes else os.fsencode(key)
    if _PLAIN(raw):
        return raw
    if not raw:
        raise ValueError("the key is empty")
    return _ESCAPED.sub(lambda found: b"%%%02X" % ord(found[0]), raw)


def key_of(name: bytes) -> bytes | None:
    """Return the key of a file name, or None for a name that no key has."""
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), name)
    return raw if raw and name_of(raw) == name else None


class KeyValue:
    """The values in one directory; `Client.kv` makes it.  Thread-safe.

    Keys are str or bytes; a str means its UTF-8 bytes.  Values have up to VALUE_MAX bytes;
    reading a larger file raises OSError EFBIG.
    """

    def __init__(self, client: Client, path: str) -> None:
        self._client = client
        self._path = path
        self._found = (0, 0)  # the inode of the directory at a commit word; no commit word is 0

    def __repr__(self) -> str:
        return f"<ivshmemfs.KeyValue {self._path!r} of {self._client.spec!r}>"

    def _run(self, action: Callable[[Filesystem, int], T], name: bytes = b"") -> T:
        """Return what `action` returns for the engine and the inode of the directory."""
        return self._client.session.call(
            lambda fs: action(fs, self._folder(fs)), lambda: self._about(name)
        )

    def _folder(self, fs: Filesystem) -> int:
        """Return the inode of the directory; another one may be at its path after a commit."""
        word, folder = self._found
        if (now := fs.commit_word()) != word:
            folder = walk.existing(fs, self._path).ino
            self._found = now, folder
        return folder

    def _about(self, name: bytes) -> str:
        return f"{self._path.rstrip('/')}/{os.fsdecode(name)}"

    # --- reading --------------------------------------------------------------------------------

    def get_item(self, key: Key) -> Item | None:
        """Return the value of a key with its note and version, or None."""
        name = name_of(key)
        return self._run(lambda fs, folder: fs.look(lambda view: _item(view, folder, name)), name)

    def get(self, key: Key, default: bytes | None = None) -> bytes | None:
        """Return the value of a key, or `default`."""
        name = name_of(key)
        found = self._client.session.call(
            lambda fs: fs.value(self._folder(fs), name, VALUE_MAX), lambda: self._about(name)
        )
        return default if found is None else found

    def get_many(self, keys: Iterable[K]) -> dict[K, bytes]:
        """Return the values of those keys that have one, all from the same commit."""
        ready = {key: name_of(key) for key in keys}

        def read(fs: Filesystem, folder: int) -> dict[K, bytes]:
            def look(view: View) -> dict[K, bytes]:
                found = {
                    key: contents.value(view, folder, name, VALUE_MAX)
                    for key, name in ready.items()
                }
                return {key: value for key, value in found.items() if value is not None}

            return fs.look(look)

        return self._run(read)

    def scan(self, prefix: Key = b"") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, in no order.

        A key that exists all the time appears exactly once.
        """
        begin = os.fsencode(prefix)
        for entry in self._client.scandir(self._path):
            key = key_of(os.fsencode(entry.name))
            if key is not None and key.startswith(begin) and entry.is_file(follow_symlinks=False):
                yield os.fsdecode(key)

    def __contains__(self, key: Key) -> bool:
        name = name_of(key)

        def find(fs: Filesystem, folder: int) -> bool:
            return fs.look(lambda view: contents.find(view, folder, name)) is not None

        return self._run(find, name)

    def __getitem__(self, key: Key) -> bytes:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    # --- changing -------------------------------------------------------------------------------

    def set(self, key: Key, value: ReadableBuffer, note: bytes = b"") -> None:
        """Set the value of a key, and its note, in one commit; raises OSError ENOSPC, EFBIG."""
        self.update(key, lambda _old: Item(bytes(value), note))

    def set_many(self, values: Mapping[K, ReadableBuffer]) -> None:
        """Set all values in one commit: every other reader finds all of them, or none.

        Raises OSError EFBIG for more than VALUE_MAX bytes in all, E2BIG for more than BATCH_MAX
        values, ENOSPC.
        """
        ready = [(name_of(key), bytes(value)) for key, value in values.items()]
        me = self._client.context

        def store(fs: Filesystem, folder: int) -> None:
            _refuse_large(sum(len(value) for _, value in ready))
            if len(ready) > BATCH_MAX:
                raise FsError(errno.E2BIG, f"{len(ready)} values are more than {BATCH_MAX}")

            def plan(tx: Transaction) -> None:
                for name, value in ready:
                    contents.store(tx, folder, name, value, 0o666, me, {NOTE: b""})

            fs.change(plan)

        self._run(store)

    def update(self, key: Key, change: Callable[[Item | None], Item | None]) -> Item | None:
        """Set a value that depends on the present one, in one commit; returns the item set.

        `change` gets the present item or None, and returns the new one, or None to change nothing.
        It may run several times, and must not use the client.  What it raises ends the call.
        """
        name, me = name_of(key), self._client.context

        def store(fs: Filesystem, folder: int) -> Item | None:
            def plan(tx: Transaction) -> Item | None:
                old = _item(tx, folder, name)
                try:
                    new = change(old)
                except Exception as error:
                    raise _Refused(error) from error
                if new is not None:
                    _refuse_large(len(new.value))
                    contents.store(tx, folder, name, new.value, 0o666, me, {NOTE: new.note})
                return new

            return fs.change(plan)

        try:
            return self._run(store, name)
        except _Refused as refused:
            error = refused.error
        raise error  # out of the handler, so that its own cause and context stay

    def delete(self, key: Key, version: int | None = None) -> bool:
        """Remove a key, with `version` only that version of it; returns whether it did."""
        name = name_of(key)

        def remove(fs: Filesystem, folder: int) -> bool:
            def plan(tx: Transaction) -> bool:
                found = contents.find(tx, folder, name)
                if found is None or version not in (None, contents.version(tx, found.ino)):
                    return False
                names.unlink(tx, folder, name)
                return True

            return fs.change(plan, removal=True)

        return self._run(remove, name)

    def clear(self) -> int:
        """Remove all keys that it finds, each in a commit of its own; returns how many."""
        return sum(self.delete(key) for key in list(self.scan()))

    def __setitem__(self, key: Key, value: ReadableBuffer) -> None:
        self.set(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)


def _item(view: View, folder: int, name: bytes) -> Item | None:
    found = contents.load(view, folder, name, NOTE, VALUE_MAX)
    return None if found is None else Item._make(found)


def _refuse_large(size: int) -> None:
    if size > VALUE_MAX:
        raise FsError(errno.EFBIG, f"{size} bytes are more than {VALUE_MAX}, one commit's limit")
