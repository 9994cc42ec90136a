"""Doorbells: the server that hands out memory and interrupts to QEMU, and what rings.

- ``messages``: the bytes of QEMU's ivshmem client-server protocol, version 0
- ``listening``: the socket's file: its mode, its group, a stale one
- ``server``: the clients, and what each is told of the others
- ``client``: a process on the host that rings and is rung
- ``device``: the same for a device in a guest: registers and interrupts
- ``finding``: which of the two a region has

`shm/bells.py` says when a doorbell rings.  Only ``server`` knows trio.  This file imports nothing.
"""
