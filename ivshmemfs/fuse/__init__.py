"""The translation between the kernel (FUSE, through pyfuse3 or without it) and the engine.

No filesystem semantics live here, and nothing outside this package knows pyfuse3 or trio:

- ``operations``: every operation in the kernel's terms, the only caller of the engine, with
  ``nodeids``, ``walks``, ``rights`` (and ``callers``), ``ownership`` and ``retry``
- ``kernel_frontend``: requests read from the FUSE descriptor, whose bytes ``protocol`` declares
- ``pyfuse3_frontend``: the same requests where pyfuse3 reads them
- ``connection``: opening the FUSE connection, so that requests can be read and files mapped
- ``loop``: how the daemon waits for the next request
- ``mountpoint``: what can be mounted on, what is mounted, fusermount3
- ``options``: the ``-o`` options
- ``session``: one mount, from the first request to the last; ``upkeep``: its housekeeping
- ``daemon``: processes, signals; ``logs``: what the daemon tells

This file imports nothing, so that commands which mount nothing start without trio and pyfuse3.
"""
