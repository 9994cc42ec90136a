#!/bin/sh
# ivshmemfs @VERSION@ for Linux on @MACHINE@: the commands with everything that they need.
#
#   sh ivshmemfs-bundle.sh [DIRECTORY]               install, or replace an older version
#   sh ivshmemfs-bundle.sh --uninstall [DIRECTORY]   remove it
#   sh ivshmemfs-bundle.sh --version                 say what this file carries
#
# DIRECTORY is /opt/ivshmemfs unless it is given.  The commands are linked into /usr/local/bin and
# /sbin, where mount(8) and fsck(8) look for their helpers.  DESTDIR in the environment puts all of it
# below another root, such as a guest's disk image.  The machine needs a shell, tail, tar and gzip
# (busybox has them), and to mount, root and a kernel with FUSE.
set -eu

VERSION='@VERSION@' MACHINE='@MACHINE@' FIRST=@FIRST@ SUM='@SUM@'
DESTDIR=${DESTDIR:-}
HELPERS='mount.ivshmemfs mount.fuse.ivshmemfs mkfs.ivshmemfs fsck.ivshmemfs' # in /sbin
COMMANDS='ivshmemfs mkfs.ivshmemfs fsck.ivshmemfs'
UNITS=$DESTDIR/usr/local/lib/systemd/system
MAN=$DESTDIR/usr/local/share/man

fail() {
    echo "ivshmemfs-bundle: $*" >&2
    exit 1
}

# Where a shell looks for completions that are not the distribution's; nothing without that shell.
completions_of() {
    case $1 in
    bash-completion) local_place=bash-completion/completions ;;
    zsh) local_place=zsh/site-functions ;;
    fish) local_place=fish/vendor_completions.d ;;
    esac
    [ ! -d "$DESTDIR/usr/share/$1" ] || echo "$DESTDIR/usr/local/share/$local_place"
}

# The first of these directories that exists.
bin_directory() {
    for place in /usr/local/bin /usr/bin /bin; do
        [ ! -d "$DESTDIR$place" ] || { echo "$DESTDIR$place"; return; }
    done
}

# Make the link $2 lead to $1, in one step where there is one already.
link() {
    if ln -s "$1" "$2.$$" && rename "$2.$$" "$2"; then
        return
    fi
    rm -f "$2.$$"
    fail "the link $2 could not be made"
}

carried_python() {
    "$NEW/lib/ld.so" --argv0 "$NEW/bin/python3" --library-path "$NEW/lib" "$NEW/python" -I -S "$@"
}

# mv(1) would move into the directory that a link leads to.
rename() { carried_python -c 'import os, sys; os.replace(*sys.argv[1:])' "$1" "$2"; }

# Remove links into the installation, and nothing else of that name.
unlink_ours() {
    case $(readlink "$1" 2>/dev/null) in
    "$TARGET"/*) rm -f "$1" ;;
    esac
}

# The first process that runs from a directory, or nothing.
user_of() {
    for maps in /proc/[0-9]*/maps; do
        if grep -q " $1/" "$maps" 2>/dev/null; then
            maps=${maps#/proc/}
            echo "${maps%/maps}"
            return
        fi
    done
}

# The version that is installed, or nothing.
installed() {
    if [ -f "$PLACE/current/VERSION" ]; then
        cat "$PLACE/current/VERSION"
    elif [ -f "$PLACE/pyvenv.cfg" ]; then # a bundle before the one that carries its Python
        said=$("$PLACE/bin/ivshmemfs" --version 2>/dev/null) || said='of an unknown version'
        echo "${said#ivshmemfs, version }"
    fi
}

# Remove every version but the current one, unless a process runs from it.
remove_old() {
    current=$(readlink "$PLACE/current" 2>/dev/null) || current=
    set -- "$PLACE"/versions/*
    [ $# -le 1 ] || sleep 1 # a command that was started just before the switch runs by then
    for old in "$PLACE"/versions/*; do
        [ -d "$old" ] && [ "versions/${old##*/}" != "$current" ] || continue
        process=$(user_of "${old#"$DESTDIR"}")
        if [ -n "$process" ]; then
            echo "$(cat "$old/VERSION") stays in $old, because process $process runs from it; the next installation removes it"
        else
            rm -rf "$old"
        fi
    done
    if [ -f "$PLACE/pyvenv.cfg" ]; then
        (cd "$PLACE" && rm -rf bin include lib lib64 share pyvenv.cfg)
    fi
}

uninstall() {
    before=$(installed)
    [ -n "$before" ] || fail "no ivshmemfs is installed in $PLACE"
    if [ -z "$DESTDIR" ] && grep -q ' fuse\.ivshmemfs ' /proc/mounts 2>/dev/null; then
        at=$(sed -n 's/^[^ ]* \([^ ]*\) fuse\.ivshmemfs .*/\1/p' /proc/mounts | head -n 1)
        fail "ivshmemfs is mounted at $at: unmount it first"
    fi
    for name in $COMMANDS; do unlink_ours "$(bin_directory)/$name"; done
    for name in $HELPERS; do unlink_ours "$DESTDIR/sbin/$name"; done
    for page in "$PLACE"/current/share/man/man?/*; do
        unlink_ours "$MAN/${page#"$PLACE"/current/share/man/}"
    done
    for shell in bash-completion zsh fish; do
        place=$(completions_of $shell)
        for file in "$PLACE/current/share/$shell"/*; do
            [ -z "$place" ] || unlink_ours "$place/${file##*/}"
        done
    done
    for unit in "$PLACE"/current/share/systemd/*; do
        [ ! -f "$unit" ] || rm -f "$UNITS/${unit##*/}"
    done
    rm -f "$PLACE/current"
    remove_old
    rmdir "$PLACE/versions" 2>/dev/null || true
    rmdir "$PLACE" 2>/dev/null || true
    echo "ivshmemfs $before is removed from $PLACE"
}

install() {
    [ -f "$0" ] || fail "save it as a file first: sh ivshmemfs-bundle.sh"
    [ "$(uname -m)" = "$MACHINE" ] || fail "this bundle is for $MACHINE, and this machine is $(uname -m): make one there"
    before=$(installed)
    mkdir -p "$PLACE/versions" 2>/dev/null || fail "$PLACE cannot be made: run as root, or name a DIRECTORY"
    count=1
    until mkdir "$PLACE/versions/$VERSION-$count" 2>/dev/null; do
        [ -d "$PLACE/versions/$VERSION-$count" ] || fail "$PLACE/versions is not writable: run as root"
        count=$((count + 1))
    done
    name=$VERSION-$count
    NEW=$PLACE/versions/$name
    trap 'rm -rf "$NEW"' EXIT
    trap 'exit 1' INT TERM HUP
    # shellcheck disable=SC2094
    { tail -n "+$FIRST" "$0" | gzip -dc || : >"$NEW/broken"; } | tar -xf - -C "$NEW" ||
        fail "the packages could not be unpacked into $NEW: is there room for 80 MB?"
    [ ! -e "$NEW/broken" ] || fail "this file is damaged or cut short; its checksum (cksum) is to be $SUM from line $FIRST on: copy it again"
    for script in "$NEW"/bin/*; do
        sed "s|@DIR@|$TARGET/versions/$name|g" "$script" >"$script.new"
        chmod 755 "$script.new"
        mv "$script.new" "$script"
    done
    said=$(carried_python "$NEW/commands/ivshmemfs" --version) || fail "the commands do not run on this machine"
    link "versions/$name" "$PLACE/current"
    trap - EXIT INT TERM HUP
    links
    [ -n "$DESTDIR" ] || [ -c /dev/fuse ] || echo "note: there is no /dev/fuse here yet: 'modprobe fuse' before mounting" >&2
    remove_old
    case $before in
    '') echo "${said#ivshmemfs, version } is installed in $PLACE" ;;
    *) echo "${said#ivshmemfs, version } is installed in $PLACE, in place of $before" ;;
    esac
}

links() {
    bin=$(bin_directory)
    if [ -n "$bin" ] && [ -w "$bin" ]; then
        for name in $COMMANDS; do link "$TARGET/current/bin/$name" "$bin/$name"; done
    else
        echo "note: the commands are in $TARGET/current/bin; no directory for links is writable" >&2
    fi
    if [ -d "$DESTDIR/sbin" ] && [ -w "$DESTDIR/sbin" ]; then # mount(8) looks in no other place
        for name in $HELPERS; do link "$TARGET/current/bin/$name" "$DESTDIR/sbin/$name"; done
    else
        echo "note: /sbin is not writable, so mount(8) and fstab will not know ivshmemfs" >&2
    fi
    if [ -d "$DESTDIR/usr/share/man" ] && mkdir -p "$MAN/man5" "$MAN/man8" 2>/dev/null; then
        for page in "$NEW"/share/man/man?/*; do
            link "$TARGET/current/${page#"$NEW"/}" "$MAN/${page#"$NEW"/share/man/}"
        done
    fi
    for shell in bash-completion zsh fish; do
        place=$(completions_of $shell)
        [ -n "$place" ] && mkdir -p "$place" 2>/dev/null || continue
        for file in "$NEW/share/$shell"/*; do
            link "$TARGET/current/share/$shell/${file##*/}" "$place/${file##*/}"
        done
    done
    if [ -d "$DESTDIR/etc/systemd/system" ] && mkdir -p "$UNITS" 2>/dev/null; then
        cp "$NEW"/share/systemd/* "$UNITS/" || echo "note: no units in $UNITS" >&2
    fi
}

action=install
case ${1:-} in
--uninstall)
    action=uninstall
    shift
    ;;
--version)
    echo "ivshmemfs $VERSION for $MACHINE"
    exit 0
    ;;
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
-*) fail "unknown option $1: see --help" ;;
esac
TARGET=${1:-/opt/ivshmemfs}
case $TARGET in
/*) ;;
*) TARGET=$(pwd)/$TARGET ;;
esac
TARGET=${TARGET%/}
PLACE=$DESTDIR$TARGET
$action
exit 0
