"""fsspec's view of a region: `ivshmemfs://` paths, with the option `region`.

The package's entry point registers the class, so pandas, dask and other users of fsspec find it:

    fsspec.open("ivshmemfs:///a/b", region="label=hello")

Instances with the same options are one peer.  Listings are not cached, so a change of another
machine is seen at once.  fsspec's transactions are refused: each file of one would need a name of
its own until the end.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.utils import isfilelike, stringify_path

from ivshmemfs.api.opening import open as open_region

if TYPE_CHECKING:
    from ivshmemfs.api.client import DirEntry

_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}


class IvshmemFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A region; options as `ivshmemfs.open` has them, and `auto_mkdir`.

    With `auto_mkdir`, what writes a file makes the directories above it.  Raises OSError with errno
    and filename.
    """

    protocol = "ivshmemfs"
    root_marker = "/"

    def __init__(
        self, region: str, readonly: bool = False, auto_mkdir: bool = False, **options: Any
    ) -> None:
        super().__init__(region=region, readonly=readonly, auto_mkdir=auto_mkdir, **options)
        self.client = open_region(region, readonly=readonly)
        self.auto_mkdir = auto_mkdir

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = stringify_path(path).removeprefix("ivshmemfs://")
        return "/" + text.strip("/")

    def _prepare(self, path: str) -> str:
        """Return the plain path, with the directories above it made if the option says so."""
        plain: str = self._strip_protocol(path)
        if self.auto_mkdir:
            self.client.makedirs(self._parent(plain), exist_ok=True)
        return plain

    # --- looking --------------------------------------------------------------------------------

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        """Return the attributes of what a path leads to, with those of os.stat by name."""
        plain = self._strip_protocol(path)
        own = self.client.lstat(plain)
        link = stat.S_ISLNK(own.st_mode)
        found = _info(plain, self.client.stat(plain) if link else own)
        found["islink"] = link
        if link:
            found["destination"] = self.client.readlink(plain)
        return found

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        """Return the entries of a directory, or the file itself: attributes, or names."""
        plain = self._strip_protocol(path)
        if not self.client.is_dir(plain):
            own = self.info(plain)
            return [own] if detail else [own["name"]]
        entries = self.client.scandir(plain)
        return [self._entry(entry) if detail else entry.path for entry in entries]

    def _entry(self, entry: DirEntry) -> dict[str, Any]:
        """Return the attributes of an entry; a link to a directory has type other: walks end."""
        link = entry.is_symlink()
        try:
            found = _info(entry.path, entry.stat())
        except OSError:  # a link that leads nowhere
            found = _info(entry.path, entry.stat(follow_symlinks=False))
        if link and found["type"] == "directory":
            found["type"] = "other"
        return found | {"islink": link}

    def exists(self, path: str, **_options: Any) -> bool:
        """Whether a path leads to something."""
        return self.client.exists(self._strip_protocol(path))

    def lexists(self, path: str, **_options: Any) -> bool:
        """Do the same without following a link at the end."""
        plain = self._strip_protocol(path)
        return self.client.exists(plain) or self.client.is_symlink(plain)

    def isfile(self, path: str) -> bool:
        """Whether a path leads to a regular file."""
        return self.client.is_file(self._strip_protocol(path))

    def isdir(self, path: str) -> bool:
        """Whether a path leads to a directory."""
        return self.client.is_dir(self._strip_protocol(path))

    def islink(self, path: str) -> bool:
        """Whether a path leads to a symbolic link."""
        return self.client.is_symlink(self._strip_protocol(path))

    def created(self, path: str) -> datetime:
        """Return the time of the creation."""
        return _moment(self.client.created_ns(self._strip_protocol(path)))

    def modified(self, path: str) -> datetime:
        """Return the time of the last change of the contents."""
        return _moment(self.client.stat(self._strip_protocol(path)).st_mtime_ns)

    def ukey(self, path: str) -> str:
        """Return a text that changes with the contents."""
        status = self.client.stat(self._strip_protocol(path))
        return f"{status.st_ino}-{status.st_ctime_ns}-{status.st_size}"

    # --- files ----------------------------------------------------------------------------------

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **_options: Any,
    ) -> Any:
        if not autocommit:
            raise NotImplementedError("ivshmemfs:// has no transactions: write, then rename")
        plain = self._strip_protocol(path) if mode[0] == "r" else self._prepare(path)
        return self.client.open(plain, mode, -1 if block_size is None else block_size)

    def open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any
    ) -> Any:
        """Open a file as the built-in open does; `block_size` is the buffer's, in bytes."""
        return super().open(path, mode, block_size, **options)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_options: Any
    ) -> bytes:
        """Return the contents of a file, or a part; negative offsets count from its end."""
        plain = self._strip_protocol(path)
        if start is None and end is None:
            return self.client.read_bytes(plain)
        with self.client.open(plain, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            first, behind, _ = slice(start, end).indices(size)
            file.seek(first)
            return file.read(max(behind - first, 0))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_options: Any) -> None:
        """Set the contents of a file; no reader sees a part of up to 1 MiB."""
        plain = self._prepare(path)
        if mode == "create":
            with self.client.open(plain, "xb") as file:
                file.write(value)
        else:
            self.client.write_bytes(plain, value)

    def touch(self, path: str, truncate: bool = True, **_options: Any) -> None:
        """Make a file, or set its times; with `truncate` empty it."""
        plain = self._prepare(path)
        self.client.open(plain, "wb" if truncate else "ab").close()
        self.client.utime(plain)

    # --- names ----------------------------------------------------------------------------------

    def mkdir(self, path: str, create_parents: bool = True, **_options: Any) -> None:
        """Make a directory."""
        self.client.mkdir(self._strip_protocol(path), parents=create_parents)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and those above it."""
        self.client.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        self.client.rmdir(self._strip_protocol(path))

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self.client.remove(self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, and with `recursive` directories with all below them."""
        for one in path if isinstance(path, list) else [path]:
            plain = self._strip_protocol(one)
            if not self.client.is_dir(plain) or self.client.is_symlink(plain):
                self.client.remove(plain)
            elif recursive:
                self.client.rmtree(plain)
            else:
                raise IsADirectoryError(f"{plain} is a directory: recursive=True removes it")

    def mv(self, path1: str, path2: str, recursive: bool = True, **_options: Any) -> None:
        """Move a file or a directory in one commit; into `path2` if that is a directory."""
        source, target = self._strip_protocol(path1), self._prepare(path2)
        if self.client.is_dir(target):
            target = f"{target.rstrip('/')}/{source.rsplit('/', 1)[1]}"
        self.client.rename(source, target)

    def link(self, src: str, dst: str, **_options: Any) -> None:
        """Give a file another name."""
        self.client.link(self._strip_protocol(src), self._prepare(dst))

    def symlink(self, src: str, dst: str, **_options: Any) -> None:
        """Make a symbolic link at `dst` with the target `src`, which is better relative."""
        self.client.symlink(src, self._prepare(dst))

    # --- copies ---------------------------------------------------------------------------------

    def cp_file(self, path1: str, path2: str, **_options: Any) -> None:
        """Copy a file within the region, or make a directory like one."""
        source, target = self._strip_protocol(path1), self._prepare(path2)
        if self.client.is_dir(source):
            self.client.makedirs(target, exist_ok=True)
            return
        with self.client.open(source, "rb") as stream:
            self.client.copy_in(stream, target)

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None,
        **_options: Any,
    ) -> None:  # fmt: skip
        """Copy a file to a local path or an open file, or make a local directory like one."""
        source = self._strip_protocol(rpath)
        target = lpath if isfilelike(lpath) else outfile
        if target is None and self.client.is_dir(source):
            os.makedirs(lpath, exist_ok=True)
            return
        callback.set_size(self.client.stat(source).st_size)
        if target is None and (above := os.path.dirname(lpath)):
            os.makedirs(above, exist_ok=True)
        callback.relative_update(self.client.copy_out(source, lpath if target is None else target))

    def put_file(
        self, lpath: str, rpath: str, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite",
        **_options: Any,
    ) -> None:  # fmt: skip
        """Copy a local file into the region, or make a directory like a local one."""
        target = self._prepare(rpath)
        if os.path.isdir(lpath):
            self.client.makedirs(target, exist_ok=True)
            return
        if mode == "create" and self.client.exists(target):
            raise FileExistsError(target)
        callback.set_size(os.path.getsize(lpath))
        callback.relative_update(self.client.copy_in(lpath, target))


def _info(path: str, status: os.stat_result) -> dict[str, Any]:
    kind = _TYPES.get(stat.S_IFMT(status.st_mode), "other")
    fields = ("mode", "uid", "gid", "ino", "nlink", "mtime")
    found = {field: getattr(status, f"st_{field}") for field in fields}
    size = status.st_size if kind == "file" else 0
    return {"name": path, "size": size, "type": kind, "islink": False, **found}


def _moment(ns: int) -> datetime:
    return datetime.fromtimestamp(ns / 1e9, tz=UTC)
