"""Hand-written sections of the manual pages; scripts/man adds what the commands declare.

A section is a title and its text.  Text is paragraphs between empty lines.  After a line ``\\b``
a paragraph keeps its lines: "  TERM  MEANING" is an entry of a list, other lines are literal.
"""

from __future__ import annotations

IVSHMEMFS = {
    "description": """
ivshmemfs is a filesystem in the memory that QEMU shares between a host and its guests: the
ivshmem device.  The host and every guest mount it at the same time, read-write.  They need no
network, no server and no kernel module.

This command mounts and unmounts a region, shows what is on it, and uses files without a mount.
mkfs.ivshmemfs(8) makes a region; fsck.ivshmemfs(8) checks one.  ivshmemfs(5) explains REGION.
A command that takes a REGION also takes a mount point of it.
""",
    "environment": """
\b
  IVSHMEMFS_DEBUG  print the traceback of an internal error
""",
}

MOUNT_SYNOPSIS = ("mount -t ivshmemfs [-o OPTIONS] REGION MOUNTPOINT",)

MOUNT = {
    "description": """
mount(8) calls this helper for the type ivshmemfs.  It does what "ivshmemfs mount" does, and
returns when the mount is usable.  ivshmemfs(5) explains REGION and shows lines for /etc/fstab.

mount.fuse.ivshmemfs is the same helper, for the type fuse.ivshmemfs.
""",
}

FORMAT = {
    "description": """
A region is memory that several machines have in common: a file of the host, the ivshmem device
of a guest.  Its first block is a superblock; ivshmemfs(8), subcommand dump, prints every field.

All machines that mount a region must run the same version of ivshmemfs.
""",
    "regions": """
A REGION is one of:

\b
  /dev/shm/NAME      a regular file, on tmpfs, hugetlbfs or any other filesystem
  file:PATH          the same file, for fstab
  pci                the one ivshmem device of this machine
  pci:ADDRESS        the ivshmem device at ADDRESS, such as 0000:00:04.0
  vfio:ADDRESS       the same through VFIO, if vfio-pci holds the device
  mem:ADDRESS:SIZE   physical memory, through /dev/mem
  /dev/NAME          a character device that maps the memory
  PATH:SIZE          the same, with its size
  PATH:OFFSET:SIZE   the same, from an offset on
  label=LABEL        the file or device that carries the filesystem of that name
  uuid=UUID          the file or device that carries the filesystem of that UUID
""",
    "paths in a region": """
The subcommands that need no mount name a file as REGION:/path, such as label=hello:/inbox/a.
They also take a path on a mount.  Symbolic links in such a path are not followed.  A user that
can open the region can use all its files: their permissions are not checked.  A command that gets
several paths ends at the first one that fails.
""",
    "fstab": """
Write file: before the path of a file.  systemd takes a bare /dev/shm/hello for a device, and
waits 90 s for it.  Write label= and uuid= in lower case.

\b
label=hello          /mnt/shared  ivshmemfs  nofail  0 0
file:/dev/shm/hello  /mnt/shared  ivshmemfs  nofail  0 0
""",
    "what a mount promises": """
A call that has returned on one mount is seen by every call that starts later on any mount.

Every operation is atomic, for every mount and across a death at any instant.  So is each write of
up to 1 MiB.  O_APPEND loses and tears no line.

A dead or paused machine blocks no other machine.

Every machine that has the region can read and destroy all of it.  Permissions hold within a
machine, not between machines that distrust each other.
""",
}
