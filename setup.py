"""Builds the native extension, and compiles ahead of time what every request runs through.

The Python source of the compiled modules is what is edited, tested and read.  With
IVSHMEMFS_COMPILE=0, without mypyc's result, it runs three times as slow.  A compiled wheel fits the
Python that it was built with.  One that is not compiled fits every Python from 3.11 on, because
its native extension keeps to the limited API.  That costs it up to a third of a short call.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.maxsize < 1 << 32:
    sys.exit("ivshmemfs needs a 64-bit Python: a 32-bit one tears the words of a region")
if sys.byteorder != "little":
    sys.exit("ivshmemfs needs a little-endian machine, as the words of a region are")

NATIVE = "ivshmemfs/native"
LIMITED = [("Py_LIMITED_API", "0x030b0000"), ("CYTHON_LIMITED_API", "1")]
COMPILE = os.environ.get("IVSHMEMFS_COMPILE", "1") != "0"
# Only what is hot, and nothing that declares records: they are read from their annotations.
COMPILED = (
    "ivshmemfs/engine/[a-z]*.py",
    "ivshmemfs/shm/commit.py",
    "ivshmemfs/shm/freelist.py",
    "ivshmemfs/shm/membership.py",
    "ivshmemfs/shm/nodes.py",
    "ivshmemfs/shm/peers.py",
    "ivshmemfs/shm/published.py",
    "ivshmemfs/shm/workspace.py",
    "ivshmemfs/format/dirent.py",
    "ivshmemfs/format/open_filter.py",
    "ivshmemfs/format/record.py",
    "ivshmemfs/format/words.py",
)
# A group of its own: to these modules an engine is any object, so that a test double can be one.
COMPILED_FRONT = (
    "ivshmemfs/fuse/kernel_frontend.py",
    "ivshmemfs/fuse/nodeids.py",
    "ivshmemfs/fuse/operations.py",
    "ivshmemfs/fuse/ownership.py",
    "ivshmemfs/fuse/rights.py",
    "ivshmemfs/fuse/walks.py",
)


class Build(build_ext):  # type: ignore[misc]  # setuptools has no types here
    """Generates C when it comes to building, not for every look at the metadata."""

    def finalize_options(self) -> None:
        """Called once the options are known; adds the compiled modules."""
        from Cython.Build import cythonize

        modules = self.distribution.ext_modules
        modules[:1] = cythonize(modules[:1], build_dir="build")  # type: ignore[no-untyped-call]
        if COMPILE and len(modules) == 1:
            from mypyc.build import mypycify

            for group, patterns in (("_compiled", COMPILED), ("_compiled_front", COMPILED_FRONT)):
                paths = sorted(str(path) for pattern in patterns for path in Path().glob(pattern))
                modules += mypycify(
                    paths, group_name=f"ivshmemfs.{group}", opt_level="2", debug_level="0"
                )
        super().finalize_options()  # which prepares every module that there is by now


setup(
    ext_modules=[
        Extension(
            "ivshmemfs.native._native",
            sources=[f"{NATIVE}/_native.pyx", *sorted(map(str, Path(NATIVE).glob("*.c")))],
            depends=sorted(map(str, Path(NATIVE).glob("*.h"))),
            include_dirs=[NATIVE],
            define_macros=[] if COMPILE else LIMITED,
            extra_compile_args=["-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            py_limited_api=not COMPILE,
        )
    ],
    cmdclass={"build_ext": Build},
    data_files=[
        (f"share/man/man{section}", sorted(map(str, Path("docs/man").glob(f"*.{section}"))))
        for section in (5, 8)
    ],
    options={} if COMPILE else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
