"""The on-region format: the one declaration of every record, pure and without I/O.

Each module declares records as NamedTuples whose annotations carry offset, width and meaning
(`record.At`); packing, `dump` and the tables of docs/format.md derive from them.
"""
