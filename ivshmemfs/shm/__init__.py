"""All concurrency between machines: what peers share, and what each keeps of it.

    commit      the commit word and the hint word
    peers       the peer table: the slots of all peers
    membership  this mount's own slot
    identity    what is known of a peer's process
    watch       which peers show life, and which are gone
    workspace   the claims and private blocks of one transaction
    freelist    where a mount finds free blocks
    published   the published blocks, and the cache of their nodes
    nodes       the record of one node
    repair      the exclusive session of one repair

No module here knows what an inode is.
"""
