"""The on-region format: the one declaration of every record, without I/O.

Each module declares records as NamedTuples.  Their annotations give offset, width and meaning
(`record.At`).  Packing, `dump` and the tables of docs/format.md derive from them.
"""
