"""`doctor`: checks of a region and of this machine, each with the reason and what to type.

- ``commands``: the subcommand
- ``facts``: gathers what a check needs; ``checks``: judges it
- ``hypervisor``: the lines for QEMU, libvirt and fstab
"""
