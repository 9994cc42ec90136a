"""Builds the one C extension; everything else is declared in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ivshmemfs.region._memory",
            sources=["ivshmemfs/region/_memory.c"],
            depends=["ivshmemfs/region/_access.h", "ivshmemfs/region/_crc32c.h"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ],
    # One wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
