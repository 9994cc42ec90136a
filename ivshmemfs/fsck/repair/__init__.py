"""Repairing a region: survey, decide, rebuild, store.

Modules:

    run      shuts other peers out, repairs in rounds, publishes the result
    survey   which blocks belong to which inode (the lenient policy of the walker)
    inodes   one damaged inode, without contradictions
    names    which names are kept, and what goes to /lost+found
    slots    the peer slots afterwards, and the tags that blocks can keep
    trees    the repaired trees, in memory
    writer   claims and new blocks in the region
"""

from ivshmemfs.fsck.repair.run import repair

__all__ = ["repair"]
