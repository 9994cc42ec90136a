"""What people do all day: copying, archiving, finding, versions, databases, building."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
from pathlib import Path

import pytest

from tests.programs.programs import run
from tests.support.lab import SHARED_MAPPINGS, needs_fuse, needs_root
from tests.support.programs import find

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with everything that a copying program may lose."""
    top = tmp_path_factory.mktemp("source") / "tree"
    chance = random.Random(5)
    for number in range(120):
        folder = top / f"d{number % 9}" / f"e{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file {number}\N{SNOWMAN}"
        path.write_bytes(chance.randbytes(chance.choice([0, 1, 800, 5000, 70_000])))
        path.chmod(chance.choice([0o600, 0o644, 0o755, 0o4711, 0o2755]))
        os.utime(path, ns=(10**18 + number, 10**18 + 12345 * number))
    os.link(top / "d1" / "e1" / "file 1\N{SNOWMAN}", top / "hard link")
    os.symlink("d1/e1", top / "link")
    os.symlink("nowhere", top / "dangling")
    os.mkfifo(top / "fifo")
    os.mknod(top / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 7))
    with (top / "sparse").open("wb") as file:
        file.seek(30 << 20)
        file.write(b"end")
    os.chown(top / "hard link", 12, 34)
    (top / "d2").chmod(0o1777)
    (top / "d3").chmod(0o2755)
    return top


def facts(top: Path, *, times: bool = True) -> dict[str, object]:
    """All that a copy must keep."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = Path(folder, name)
            status = path.lstat()
            fact: list[object] = [status.st_mode, status.st_uid, status.st_gid, status.st_rdev]
            if path.is_symlink():
                fact.append(os.readlink(path))
            elif path.is_file():
                fact += [status.st_nlink, path.read_bytes()]
                fact += [status.st_mtime_ns] if times else [int(status.st_mtime)]
            found[str(path.relative_to(top))] = fact
    return found


def test_cp(tree: Path, here: Path, there: Path) -> None:
    run("cp", "-a", tree, here / "copy", cwd=here)
    assert facts(there / "copy") == facts(tree)
    assert (there / "copy" / "sparse").stat().st_blocks < 1000
    run("cp", "-a", there / "copy", there / "again", cwd=there)
    assert facts(here / "again") == facts(tree)
    run(
        "diff",
        "-r",
        "--no-dereference",
        "-x",
        "fifo",
        "-x",
        "device",
        tree,
        here / "again",
        cwd=here,
    )


@pytest.mark.parametrize("options", [["--inplace"], [], ["--append-verify"], ["--sparse"]])
def test_rsync(tree: Path, here: Path, there: Path, options: list[str]) -> None:
    words = ["rsync", "-aHX", "--devices", "--specials", *options]
    run(*words, f"{tree}/", "copy/", cwd=here)
    assert facts(there / "copy") == facts(tree)
    changed = there / "copy" / "d1" / "e1" / "file 1\N{SNOWMAN}"
    changed.write_bytes(b"changed elsewhere")
    (there / "copy" / "extra").mkdir()
    if "--append-verify" not in options:
        run(*words, "-c", "--delete", f"{tree}/", "copy/", cwd=here)
        assert facts(there / "copy") == facts(tree)


def test_tar(tree: Path, here: Path, there: Path) -> None:
    run("tar", "--posix", "-C", tree.parent, "-cSf", "archive.tar", "tree", cwd=here)
    run("tar", "-xpf", "archive.tar", cwd=there)
    assert facts(here / "tree") == facts(tree)
    run("tar", "--posix", "-df", "archive.tar", cwd=here)


def test_moving_trees(tree: Path, here: Path, there: Path) -> None:
    run("cp", "-a", tree, here / "one", cwd=here)
    run("mv", here / "one", here / "two", cwd=here)
    assert not (there / "one").exists()
    run("mv", there / "two" / "d1", there / "moved", cwd=there)
    run("mv", "-T", here / "moved", here / "two" / "d1", cwd=here)
    assert facts(there / "two") == facts(tree)
    run("mv", here / "two", there / "three", cwd=here)  # another file system to the kernel
    assert facts(here / "three") == facts(tree)
    run("rm", "-r", "three", cwd=here)
    assert os.listdir(there) == []


def test_find_and_du(tree: Path, here: Path, there: Path) -> None:
    run("cp", "-a", tree, here / "copy", cwd=here)
    for words in (["-type", "f"], ["-type", "d"], ["-links", "2"], ["-perm", "/6000"],
                  ["-size", "+10k"], ["-name", "* 1*"], ["-empty"], ["-type", "p"]):  # fmt: skip
        on_disk = run("find", ".", *words, cwd=tree).splitlines()
        assert sorted(run("find", ".", *words, cwd=there / "copy").splitlines()) == sorted(on_disk)
    apparent = run("du", "-s", "--apparent-size", "-B1", "copy/d1", cwd=there)
    assert int(apparent.split()[0]) > 70_000


def test_dd(here: Path, there: Path) -> None:
    run("dd", "if=/dev/urandom", "of=file", "bs=1M", "count=8", cwd=here)
    run("dd", "if=file", "of=direct", "bs=64k", "oflag=direct", "iflag=direct", cwd=there)
    run("dd", "if=file", "of=small", "bs=777", "conv=fsync", cwd=there)
    run("dd", "if=file", "of=file2", "bs=1M", "seek=2", "skip=2", cwd=here)
    run("dd", "if=file", "of=file2", "bs=4k", "count=512", "conv=notrunc", cwd=there)
    content = (here / "file").read_bytes()
    for name in ("direct", "small", "file2"):
        assert (here / name).read_bytes() == content
    run("dd", "if=/dev/zero", "of=sparse", "bs=1", "seek=100M", "count=1", cwd=here)
    assert (there / "sparse").stat().st_size == (100 << 20) + 1


# --- versions ---------------------------------------------------------------------------------


def test_git(tree: Path, here: Path, there: Path) -> None:
    who = {"GIT_CONFIG_GLOBAL": "/dev/null"}
    for kind in ("AUTHOR", "COMMITTER"):
        who |= {f"GIT_{kind}_NAME": "somebody", f"GIT_{kind}_EMAIL": "nobody@nowhere"}

    def git(*words: object, cwd: Path) -> str:
        return run("git", "-c", "safe.directory=*", *words, cwd=cwd, env=who)

    git("init", "-q", "repo", cwd=here)
    run("cp", "-r", tree / "d1", tree / "d2", here / "repo", cwd=here)
    git("add", ".", cwd=here / "repo")
    git("commit", "-q", "-m", "first", cwd=here / "repo")
    assert git("status", "--short", cwd=there / "repo") == ""
    git("clone", "-q", "repo", "clone", cwd=there)
    (there / "clone" / "new").write_text("new\n")
    git("add", "new", cwd=there / "clone")
    git("commit", "-q", "-m", "second", cwd=there / "clone")
    git("push", "-q", "origin", "HEAD:refs/heads/other", cwd=there / "clone")
    git("merge", "-q", "other", cwd=here / "repo")
    assert (there / "repo" / "new").read_text() == "new\n"
    git("gc", "-q", "--prune=now", cwd=here / "repo")
    git("fsck", "--strict", cwd=there / "repo")
    assert git("log", "--format=%s", cwd=here / "repo").split() == ["second", "first"]


# --- databases --------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal", "memory"])
def test_sqlite(here: Path, there: Path, journal: str) -> None:
    if journal == "wal" and not SHARED_MAPPINGS:
        pytest.skip("shared mappings need Linux 6.6, or -o mmap")
    database = sqlite3.connect(here / "db")
    database.execute(f"pragma journal_mode={journal}")
    database.execute("create table t (a integer primary key, b text)")
    for number in range(20):
        database.executemany("insert into t (b) values (?)", [("x" * number,)] * 50)
        database.commit()
        database.execute("delete from t where a % 7 = ?", (number % 7,))
        database.rollback() if number % 3 == 0 else database.commit()
    rows = database.execute("select count(*), sum(length(b)) from t").fetchone()
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()
    elsewhere = sqlite3.connect(there / "db")
    assert elsewhere.execute("select count(*), sum(length(b)) from t").fetchone() == rows
    elsewhere.close()
    find("sqlite3")
    assert run("sqlite3", "db", "pragma integrity_check", cwd=there).strip() == "ok"


def test_two_processes_in_one_sqlite_database(here: Path) -> None:
    """On one mount locks work, so several processes may write."""
    database = sqlite3.connect(here / "db", timeout=60)
    database.execute("create table t (a)")
    database.commit()
    children = []
    for who in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                own = sqlite3.connect(here / "db", timeout=60)
                for _ in range(15):
                    own.execute("insert into t values (?)", (who,))
                    own.commit()
                own.close()
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    assert database.execute("select count(*) from t").fetchone() == (45,)
    database.close()


@pytest.mark.skipif(not SHARED_MAPPINGS, reason="shared mappings need Linux 6.6, or -o mmap")
@pytest.mark.parametrize("writemap", [False, True])
def test_lmdb(here: Path, writemap: bool) -> None:
    script = f"""
import lmdb
env = lmdb.open("db", map_size=32 << 20, writemap={writemap})
for batch in range(20):
    with env.begin(write=True) as tx:
        for number in range(100):
            tx.put(b"%d-%d" % (batch, number), b"v" * number)
env.close()
env = lmdb.open("db", readonly=True)
with env.begin() as tx:
    assert tx.stat()["entries"] == 2000
    assert tx.get(b"7-99") == b"v" * 99
env.close()
"""
    if run("/usr/bin/python3", "-c", "try: import lmdb; print('yes')\nexcept ImportError: pass",
           cwd=here).strip() != "yes":  # fmt: skip
        find("python3-lmdb")
    run("/usr/bin/python3", "-c", script, cwd=here)


# --- building ---------------------------------------------------------------------------------

MAKEFILE = """
CFLAGS = -O1 -g -Wall -fPIC
objects = main.o $(patsubst %.c,%.o,$(wildcard part*.c))
all: program
libparts.so: $(filter part%,$(objects))
\t$(CC) -shared -o $@ $^
libparts.a: $(filter part%,$(objects))
\tar rcs $@ $^
program: main.o libparts.so libparts.a
\t$(CC) -o $@ main.o -L. -lparts -Wl,-rpath,'$$ORIGIN'
static: main.o libparts.a
\t$(CC) -o $@ main.o libparts.a
clean:
\trm -f *.o program static libparts.*
"""


def test_building_a_c_project(here: Path, there: Path) -> None:
    (here / "Makefile").write_text(MAKEFILE)
    for number in range(12):
        (here / f"part{number}.c").write_text(f"int part{number}(void) {{ return {number}; }}\n")
    calls = " + ".join(f"part{number}()" for number in range(12))
    declared = "".join(f"int part{number}(void);\n" for number in range(12))
    main = (
        f'#include <stdio.h>\n{declared}int main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (here / "main.c").write_text(main)
    run("make", "-j4", "all", "static", cwd=here)
    assert run(there / "program", cwd=there).strip() == "66"
    assert run(there / "static", cwd=there).strip() == "66"
    assert "up to date" in run("make", "program", cwd=there)
    (there / "part3.c").write_text("int part3(void) { return 1003; }\n")
    run("make", "program", cwd=here)
    assert run(here / "program", cwd=here).strip() == "1066"
    run("make", "clean", cwd=there)
    assert not (here / "program").exists()
