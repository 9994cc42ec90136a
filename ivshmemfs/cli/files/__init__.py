"""`ls`, `cat`, `du`, `df`, `mkdir`, `mv`, `rm`: files of a region, without a mount.

- ``show``: the subcommands that only look
- ``change``: the subcommands that change names
- ``walk``: trees, each directory once
"""
