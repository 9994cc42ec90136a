"""Measurements of ivshmemfs beside its peers: `python -m bench`.

`client.c` times operations in the current directory.  `peers` are the file systems that it runs on,
one after the other in every round, and `workloads` are its tasks.  `special` measures several
mounts, start, memory and idling.  `report` and `plots` show the outcome.

Figures are medians over rounds, and what is shown are ratios: absolute times say more about the
machine than about the file systems.
"""
