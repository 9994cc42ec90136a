"""All concurrency between machines: commit word, hint, claims and tags, peer table, node cache.

Nothing here knows what an inode is.
"""
