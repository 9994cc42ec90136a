"""The translation between the kernel (FUSE, through pyfuse3 or without it) and the engine.

No filesystem semantics live here, and nothing outside this package knows pyfuse3.  The
doorbell's server is the only other that knows trio:

- ``operations``: every operation in the kernel's terms, the only caller of the engine, with
  ``nodeids``, ``walks``, ``rights`` (and ``callers``), ``ownership`` and ``retry``
- ``kernel_frontend``: reads requests from the FUSE descriptor; ``protocol`` declares their bytes
- ``pyfuse3_frontend``: serves the same requests where pyfuse3 reads them
- ``connection``: opens the FUSE connection and negotiates its features
- ``loop``: waits for the next request
- ``mountpoint``: checks mount points, lists mounts, mounts and unmounts; ``lifeline``: tells
  whether a mount's daemon lives
- ``options``: parses the ``-o`` options
- ``session``: runs one mount from its first request to its last; ``upkeep``: its housekeeping
- ``daemon``: starts and ends the process; ``logs``: writes its log

This file imports nothing.  Commands that mount nothing therefore start without trio and pyfuse3.
"""
