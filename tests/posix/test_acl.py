"""Access lists: the same commands on a mount and on a tmpfs, line by line the same output.

Each case is a shell script that runs in an empty directory of both.  Three kinds of mounts run it.
On two of them the kernel obeys the lists: requests come from the descriptor, or through pyfuse3.
On the third, for root alone, the daemon obeys them.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, xattr
from ivshmemfs.region import open_region
from tests.posix.raising import fails
from tests.support import lab
from tests.support.lab import EVERYTHING, Lab, needs_fuse, needs_root, new_lab

needs_programs = pytest.mark.skipif(
    not all(shutil.which(name) for name in ("setfacl", "setfattr", "rsync")),
    reason="'sh scripts/setup --programs' installs acl, attr and rsync",
)
pytestmark = [needs_fuse, needs_root, needs_programs]

ROOT_ONLY = "suid,dev"
MOUNTS = {"descriptor": EVERYTHING, "pyfuse3": f"{EVERYTHING},loop=trio", "root": ROOT_ONLY}
#: What scripts call: users (`owner` and `member` share group 65533) and what prints.
PRELUDE = """
umask 022
as() { uid=$1 gid=$2 groups=$3; shift 3
       setpriv --reuid "$uid" --regid "$gid" --groups "$groups" -- "$@"; }
owner() { as 65534 65533 65533,65531 "$@"; }
member() { as 65532 65530 65530,65533 "$@"; }
other() { as 65529 65528 65528 "$@"; }
try() { "$@" >/dev/null 2>&1 && echo "yes: $*" || echo "no: $*"; }
tree() { find "$@" ! -type l | sort | xargs getfacl -n -p; }
show() { getfacl -n -p "$@"; stat -c '%n %a %u %g' "$@"; }
"""
#: What happens to lists.
SCRIPTS = {
    "an access list and the mode": """
        touch f; show f
        setfacl -m u:65534:rw,g:65533:r f; show f
        for mode in 640 604 777 000 4751 2770; do chmod $mode f; show f; done
        setfacl -m m::x f; show f
        setfacl -x u:65534 f; show f
        setfacl -x g:65533 f; show f
        setfacl -b f; show f
    """,
    "a list with a mask alone": """
        touch f; setfacl -m m::r f; show f; chmod 770 f; show f; setfacl -x m f; show f
    """,
    "a list set as a whole": """
        touch f; mkdir d
        setfacl --set u::rwx,g::r,o::-,u:5:rw,m::rwx f d; show f d
        setfacl --set u::rw,g::r,o::r f; show f
        getfattr -d -m - -e hex f d
    """,
    "inheritance by every kind": """
        mkdir d; setfacl -d -m u:65534:rwx,g:65531:r,o::- d; show d
        umask 077
        touch d/file; mkdir d/dir; mkfifo d/fifo; mknod d/node c 1 3; ln -s x d/link
        mkdir -m 711 d/exact; install -m 640 /dev/null d/installed
        show d/file d/dir d/fifo d/node d/exact d/installed
        stat -c %a d/link; getfattr -h -d -m - d/link
        ln d/file d/hard; show d/hard; mv d/file moved; show moved
    """,
    "inheritance down a tree": """
        umask 027
        mkdir -p a/b; setfacl -d -m u:7:rwx a; mkdir -p a/c/d/e; touch a/c/d/e/f a/b/g
        show a a/b a/c a/c/d a/c/d/e a/c/d/e/f a/b/g
        setfacl -d -m u:8:r a/c; touch a/c/one a/c/d/two; mkdir a/c/three
        show a/c/one a/c/d/two a/c/three
        setfacl -k a/c/d; touch a/c/d/plain; show a/c/d a/c/d/plain
        tree a
    """,
    "a default list that is a mode": """
        mkdir d; setfacl -d -m u::rwx,g::rx,o::- d; umask 777
        touch d/f; mkdir d/e; show d d/f d/e; getfattr -d -m - -e hex d/f d/e d
    """,
    "a default list under every umask": """
        mkdir d; setfacl -d -m u::rwx,u:9:rwx,g::rwx,m::rx,o::r d
        for mask in 000 022 027 077 777; do
            umask $mask; touch d/f$mask; mkdir d/d$mask; show d/f$mask d/d$mask
        done
        umask 022; mkdir plain; touch plain/f; show plain plain/f
    """,
    "set-group-ID directories": """
        mkdir d; chown 65534:65531 d; chmod 2775 d; setfacl -d -m g:65533:rwx d; show d
        owner touch d/f; owner mkdir d/e; owner mkdir d/e/g; show d/f d/e d/e/g
        setfacl -d -m u:65529:rwx d; chmod o+wx d; other touch d/x; other mkdir d/y
        show d/x d/y
    """,
    "set-group-ID and lists": """
        touch in out root; chown 65534:65533 in root; chown 65534:65500 out
        chmod 2755 in out root
        owner setfacl -m u:3:rw in; owner setfacl -m u:3:rw out; setfacl -m u:3:rw root
        show in out root
        chmod 2755 out; owner setfacl -b out; show out
        chmod 2755 out; owner chmod 2750 out; show out
        chmod 2755 in; owner chmod 2750 in; show in
        mkdir d; chown 65534:65500 d; chmod 2777 d; owner setfacl -d -m u:3:rw d; show d
        chmod 6755 out; owner sh -c 'setfacl -m o::- out'; show out
    """,
    "new owners": """
        touch f; setfacl -m u:65534:rw,g:65531:r f; chmod 6775 f
        chown 65534 f; show f; chgrp 65531 f; show f; chown 0:0 f; show f
    """,
    "who may set a list": """
        touch f; chown 65534:65533 f; chmod 666 f; mkdir d; chown 65534:65533 d; chmod 777 d
        for who in owner member other; do
            try $who setfacl -m u:5:r f; try $who setfacl -d -m u:5:r d; try $who setfacl -b f
            try $who setfacl -k d; try $who getfacl f; try $who getfacl d
        done
        show f d
    """,
    "what is no directory, and links": """
        touch f; mkfifo p; ln -s f l
        one=0x0200000001000700ffffffff04000500ffffffff20000500ffffffff
        for what in f p l; do
            try setfattr -n system.posix_acl_default -v $one $what
            try setfattr -h -n system.posix_acl_access -v $one $what
            try setfattr -x system.posix_acl_default $what
            try setfattr -x system.posix_acl_access $what
        done
        show f p; setfacl -m u:5:rw p; show p
    """,
    "malformed lists": """
        mkdir d
        u=01000700ffffffff; g=04000500ffffffff; o=20000500ffffffff; m=10000700ffffffff
        a=0200060005000000; b=0800060005000000; v=0x02000000
        for value in $v $v$u $v$u$g $v$u$g$o $v$u$o$g $v$g$u$o $v$u$u$g$o $v$u$g$g$o \\
            $v$u$a$g$o $v$u$a$g$m$o $v$u$a$a$g$m$o $v$u$g$b$m$o $v$u$g$b$o $v$u$b$g$m$o \\
            $v$u$g$m$m$o $v$u$g$m$o $v$u$g$o$o $v$u$g$o$m ${v}01000800ffffffff$g$o \\
            ${v}01000700ffffffff0400050000000000$o ${v}00000700ffffffff$g$o \\
            ${v}40000700ffffffff$u$g$o $v$u${g}02000600ffffffff$m$o $v$u$g${o}00 0x 0x02 \\
            0x01000000$u$g$o 0x03000000$u$g$o 0x00000002$u$g$o \\
            $v${u}02000600ffffffff$g$m$o $v${u}0200ff7f05000000$g$m$o
        do
            for name in access default; do
                chmod 755 d; setfattr -x system.posix_acl_$name d 2>/dev/null || true
                try setfattr -n system.posix_acl_$name -v $value d
                getfattr -d -m - -e hex d; stat -c %a d
            done
        done
    """,
    "removal": """
        mkdir d; touch f
        try setfattr -x system.posix_acl_access f; try setfattr -x system.posix_acl_default d
        try setfacl -k d; try setfacl -b f; try setfacl -k f
        setfacl -m u:5:rwx f d; setfacl -d -m u:6:rwx d; setfattr -n user.x -v kept d
        setfattr -x system.posix_acl_access f d; show f d
        setfattr -x system.posix_acl_default d; show d; getfattr -d -m - d
        try getfattr -n system.posix_acl_access f; try getfattr -n system.posix_acl_default d
    """,
    "flags of setxattr are not for lists": """
        touch f; python3 - <<'end'
import os, struct
value = struct.pack("<I" + "HHI" * 5, 2, 1, 7, 2**32-1, 2, 6, 5, 4, 5, 2**32-1,
                    16, 7, 2**32-1, 32, 0, 2**32-1)
for flags in (os.XATTR_REPLACE, os.XATTR_CREATE, os.XATTR_CREATE):
    os.setxattr("f", "system.posix_acl_access", value, flags)
print(os.listxattr("f"))
end
        show f
    """,
    "times": """
        mkdir d; touch -d 2001-01-01 f; setfacl -m u:5:r f; stat -c %y f
        setfacl -d -m u:5:r d; touch d/f; stat -c '%h %F' d d/f
    """,
    "copies": """
        mkdir -p from/d; echo content >from/d/f; setfacl -m u:5:rw,m::r from/d/f
        setfacl -m g:6:rx from/d; setfacl -d -m u:7:rwx from/d; chmod 2775 from/d
        touch from/plain; ln -s d/f from/l
        cp -a from cp; cp -r from r; cp --preserve=mode from/d/f m; mv from/plain moved
        rsync -a -A from/ rsync/; rsync -a from/ bare/
        mkdir tar; tar --acls -C from -cf - . | tar --acls -C tar -xpf -
        tree cp r m rsync bare tar
    """,
    "restored from text": """
        mkdir -p d/e; touch d/f; setfacl -R -m u:5:rwX,g:6:rX d; setfacl -d -m u:5:rwx d/e
        tree d >saved; setfacl -R -b d; chmod -R go= d; setfacl --restore=saved
        tree d
    """,
    "contents change under a list": """
        touch f; chown 65534:65533 f; setfacl -m u:65529:rw f; chmod 6777 f
        other sh -c 'echo x >>f'; show f; chmod 2767 f; other sh -c 'echo x >>f'; show f
        chmod 6777 f; truncate -s 0 f; show f
    """,
    "nameless files": """
        mkdir d; setfacl -d -m u:5:rw d; cat >program <<'end'
import os
fd = os.open("d", os.O_TMPFILE | os.O_RDWR, 0o640)
print(oct(os.fstat(fd).st_mode), os.listxattr(fd))
import ctypes
here, follow = -100, 0x400
ctypes.CDLL(None).linkat(here, b"/proc/self/fd/%d" % fd, here, b"d/named", follow)
end
        python3 program; show d/named
    """,
}
#: What a list lets users do.
PERMISSIONS = {
    "by entry": """
        mkdir d; chown 65534:65533 d; chmod 770 d; setfacl -m u:65529:rwx,u:65532:- d; echo x >d/f
        chown 65534:65533 d/f; chmod 640 d/f; setfacl -m g:65528:r d/f
        for who in owner member other; do
            try $who ls d; try $who cat d/f; try $who sh -c 'echo >>d/f'
            try $who touch d/$who; try $who test -r d/f; try $who test -w d/f
        done
        setfacl -m m::- d/f; try other cat d/f; setfacl -m m::r d; try other touch d/more
        try other ls d
    """,
    "groups": """
        echo x >f; chown 0:65533 f; chmod 606 f
        setfacl -m g:65531:w,g:65530:r f
        for who in owner member other; do
            try $who cat f; try $who sh -c ': >>f'; try $who sh -c ': <>f'
        done
        setfacl -m g::rw f
        for who in owner member other; do try $who cat f; try $who sh -c ': <>f'; done
    """,
    "execution": """
        cp /bin/true f; chmod 700 f; setfacl -m u:65529:x f; try other ./f; try member ./f
        setfacl -m u:65529:rw f; try other ./f
        mkdir d; chmod 700 d; touch d/f; setfacl -m u:65529:x d; try other stat d/f; try other ls d
        try member stat d/f
    """,
    "the mask is not the group": """
        echo x >f; chown 65534:65533 f; chmod 600 f; setfacl -m u:65529:rw f; stat -c %a f
        try member cat f; try other cat f
    """,
}
#: The same for root without capabilities, `weak`, which has no more than others.
ROOT_PERMISSIONS = """
    mkdir d; chown 65534:65533 d; chmod 700 d; echo x >d/f; chown 65534:65533 d/f; chmod 600 d/f
    weak() { setpriv --reuid 0 --regid 0 --groups 65531 --bounding-set=-all -- "$@"; }
    try weak ls d
    setfacl -m u:0:rx d; try weak ls d; try weak cat d/f; try weak touch d/g
    setfacl -m g:65531:r d/f; try weak cat d/f; try weak sh -c ': >>d/f'
    setfacl -m u:0:- d/f; try weak cat d/f; setfacl -m u:0:rw d/f; try weak sh -c ': <>d/f'
    setfacl -m m::r d/f; try weak sh -c ': <>d/f'; try weak cat d/f
    try weak setfacl -m u:5:r d/f; try weak setfacl -b d/f; try weak setfacl -d -m u:5:r d
    touch d/own; chmod 600 d/own; try weak setfacl -m u:5:r d/own; show d/own
"""


@pytest.fixture(scope="module", params=MOUNTS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of mount."""
    return str(request.param)


@pytest.fixture(scope="module")
def mount(kind: str) -> Iterator[Lab]:
    """A region with two mounts of that kind."""
    with new_lab(64 << 20, 2, MOUNTS[kind]) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """A directory of a tmpfs."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ivshmemfs-acl-"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def play(script: str, folder: Path) -> list[str]:
    """What a script prints in a new directory."""
    folder.mkdir()
    folder.chmod(0o777)
    done = subprocess.run(
        ["sh", "-eu", "-c", PRELUDE + script],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def compare(script: str, mount: Lab, model: Path, name: str) -> None:
    """The script prints the same in both places, and the second mount shows what it left."""
    name = f"{mount.region.parent.name}-{name.replace(' ', '-')}"
    expected = play(script, model / name)
    assert play(script, mount.paths[0] / name) == expected
    left = (
        'find . ! -type l | sort | xargs getfacl -n -p; find . -printf "%p %m %U %G %n\\n" | sort'
    )
    first, second, third = (
        subprocess.run(["sh", "-c", left], cwd=top / name, capture_output=True, check=True).stdout
        for top in (model, *mount.paths)
    )
    assert first == second == third


@pytest.mark.parametrize("name", SCRIPTS)
def test_lists_as_on_a_tmpfs(name: str, kind: str, mount: Lab, model: Path) -> None:
    if name == "nameless files" and kind == "pyfuse3":
        pytest.skip("pyfuse3 has no handler for O_TMPFILE")
    others = any(word in SCRIPTS[name] for word in ("owner ", "other ", "$who"))
    if others and kind == "root":
        pytest.skip("other users cannot use a mount for root alone")
    compare(SCRIPTS[name], mount, model, name)


@pytest.mark.parametrize("name", PERMISSIONS)
def test_permissions_as_on_a_tmpfs(name: str, kind: str, mount: Lab, model: Path) -> None:
    if kind == "root":
        pytest.skip("other users cannot use a mount for root alone")
    compare(PERMISSIONS[name], mount, model, name)


def test_root_without_capabilities_as_on_a_tmpfs(mount: Lab, model: Path) -> None:
    compare(ROOT_PERMISSIONS, mount, model, "root without capabilities")


def test_the_longest_list(mount: Lab) -> None:
    path = mount.paths[0] / "long"
    path.touch()
    users = ",".join(f"u:{1000 + number}:r" for number in range(507))
    subprocess.run(["setfacl", "-m", users, path], check=True)
    shown = subprocess.run(["getfacl", "-n", "-p", mount.paths[1] / "long"], capture_output=True)
    assert shown.stdout.count(b"\nuser:") == 508
    done = subprocess.run(["setfacl", "-m", "u:9:r", path], capture_output=True, text=True)
    assert "too long" in done.stderr  # E2BIG
    path.unlink()


def test_an_open_file_follows_its_list(mount: Lab, kind: str) -> None:
    """What another mount changes counts at the next call."""
    here, there = (path / "open" for path in mount.paths)
    here.write_text("content")
    here.chmod(0o600)
    words = ["setpriv", "--reuid", "65529", "--regid", "65528", "--clear-groups", "cat"]

    def read(path: Path) -> int:
        return subprocess.run([*words, path.name], cwd=path.parent, capture_output=True).returncode

    if kind != "root":
        assert read(there) != 0
        subprocess.run(["setfacl", "-m", "u:65529:r", here], check=True)
        assert read(there) == 0
        subprocess.run(["setfacl", "-m", "m::-", here], check=True)
        assert read(there) != 0
    subprocess.run(["setfacl", "-m", "u:65529:rw", here], check=True)
    assert stat.S_IMODE(there.stat().st_mode) == 0o660
    there.chmod(0o640)
    assert "system.posix_acl_access" in os.listxattr(here)
    shown = subprocess.run(["getfacl", "-c", "-p", here], capture_output=True, text=True)
    assert "mask::r--" in shown.stdout


@pytest.mark.parametrize("option", ["uid=65534", "umask=0", "noacl"])
@pytest.mark.parametrize("kind", MOUNTS)
def test_mounts_without_lists(option: str, kind: str) -> None:
    """Lists go with the stored owner and mode; a mount that shows others, or is told, has none."""
    with new_lab(16 << 20, 1, f"{MOUNTS[kind]},{option}") as lab:
        if option == "umask=0":
            assert "access lists are obeyed" in lab.mounts[0].log_text()
            return
        assert "access lists are hidden" in lab.mounts[0].log_text()
        path = lab.paths[0] / "file"
        path.touch()
        with pytest.raises(OSError, match="not supported"):
            os.getxattr(path, "system.posix_acl_access")
        assert subprocess.run(["setfacl", "-m", "u:5:r", path], capture_output=True).returncode
        fails(errno.EOPNOTSUPP, os.setxattr, path, "system.posix_acl_access", b"\x02\0\0\0")


def test_a_list_that_another_machine_damaged(mount: Lab) -> None:
    """It counts as none: the kernel would refuse every use of the file, also by root."""
    folder = mount.paths[0] / "damaged"
    folder.mkdir()
    os.chown(folder, 65534, 65533)
    folder.chmod(0o755)
    name = b"system.posix_acl_access"
    with open_region(str(mount.region)) as region:
        peer = Filesystem.mount(region)
        ino = peer.lookup(ROOT_INO, b"damaged").ino
        peer.change(lambda tx: tx.put(xattr.set_value(tx, tx.inode(ino), name, b"\2\0\0\0x", 0)))
        peer.unmount()
    assert os.listdir(folder) == os.listxattr(folder) == []
    fails(errno.ENODATA, os.getxattr, folder, name)
    subprocess.run(["setfacl", "-m", "u:5:r", folder], check=True)
    assert os.listxattr(folder) == [name.decode()]
    folder.rmdir()


def test_without_fusermount3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mounts by mount(2); lists are obeyed and the umask is left out all the same."""
    monkeypatch.setitem(lab.ENVIRONMENT, "PATH", "/nonexistent")
    with new_lab(16 << 20, 1, EVERYTHING) as made:
        folder = made.paths[0] / "folder"
        folder.mkdir()
        assert "obeyed by the kernel" in made.mounts[0].log_text()
        (folder / "secret").write_text("x")
        (folder / "secret").chmod(0o600)
        words = ["setpriv", "--reuid", "65529", "--regid", "65528", "--clear-groups"]
        assert subprocess.run([*words, "cat", "secret"], cwd=folder, capture_output=True).returncode
        subprocess.run(["setfacl", "-m", "u:65529:r", folder / "secret"], check=True)
        subprocess.run([*words, "cat", "secret"], cwd=folder, capture_output=True, check=True)
        subprocess.run(["setfacl", "-d", "-m", "u:5:rwx,o::r", folder], check=True)
        subprocess.run(["sh", "-c", "umask 077; touch masked"], cwd=folder, check=True)
        shown = subprocess.run(["getfacl", "-c", "-n", "masked"], cwd=folder, capture_output=True)
        assert b"user:5:rwx" in shown.stdout
        assert stat.S_IMODE((folder / "masked").stat().st_mode) == 0o664
