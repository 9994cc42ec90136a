"""The doorbell of ivshmem devices: the server that hands out memory and interrupts to QEMU.

- ``messages``: the bytes of QEMU's ivshmem client-server protocol, version 0
- ``listening``: the socket's file: its mode, its group, a stale one
- ``server``: the clients, and what each is told of the others

Only ``server`` knows trio.  This file imports nothing.
"""
