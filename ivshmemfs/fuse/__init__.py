"""The adapter between the kernel (FUSE, through pyfuse3) and the engine.

No filesystem semantics live here, and nothing outside this package knows pyfuse3 or trio:

- ``adapter``: one FUSE request to one engine call; errors to errno; waiting when the engine is busy
- ``loop``: how the daemon waits for the next request
- ``handshake``: opening the FUSE connection so that shared mappings work with direct I/O
- ``mountpoint``: what can be mounted on, what is mounted, fusermount3
- ``options``: the ``-o`` options
- ``session``: one mount, from the first request to the last
- ``daemon``: processes, signals, logs

This file imports nothing, so that commands which mount nothing start without trio and pyfuse3.
"""
