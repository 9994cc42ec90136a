"""`get` and `put`: copy files and trees between a region and the local disk, without a mount.

- ``commands``: the two subcommands
- ``get``: copies out of a region; ``put``: copies into one
- ``local``: directories of the local disk by descriptor, and names of unfinished files
- ``meter``: the progress bar, and what was left out
"""
