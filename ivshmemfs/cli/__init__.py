"""The command `ivshmemfs`: arguments, printing and exit codes.

- ``main``: finds the subcommand, and turns an error into one line and an exit code
- ``mount`` (`mount`, `umount`), ``info`` (`list`, `info`), ``dump``, ``peers`` (`peers`, `evict`),
  ``lock``, ``wait``, ``watch``: subcommands
- ``files``: the subcommands that need no mount for files of a region, `ls` to `rm`
- ``transfer``: the subcommands `get` and `put`
- ``doctor``: the subcommand `doctor`
- ``attach``: how a subcommand reaches a region, a mount of it, or a path in it
- ``commits``: waits for the next commit; ``output``: tables

A module imports only what its subcommand needs, so that each starts fast.
"""
