"""How a command reaches what an argument names.

- ``names``: the region or the mount point that an argument names
- ``peer``: become a peer of a region for a while, and retry what is busy
- ``paths``: paths in a region, on a mount or as REGION:/path
"""
