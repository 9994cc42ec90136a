#!/bin/sh
# Make the tree of commands that the bundle and the Debian package carry.
#
#   sh packaging/bundle/make.sh TREE      (a new directory; packaging/bundle/tree.py describes it)
#
# IVSHMEMFS_COMPILE=0 in the environment leaves the engine uncompiled.
set -eu

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
TREE=$1

env -u IVSHMEMFS_COMPILE sh "$ROOT/scripts/setup" # which keeps the kind of its environment
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
# A copy, so that building leaves nothing in the source tree.
mkdir "$WORK/source"
(cd "$ROOT" && tar -cf - --exclude='*.so' --exclude='__pycache__' \
    pyproject.toml setup.py README.md LICENSE ivshmemfs mkfs) | tar -xf - -C "$WORK/source"
export IVSHMEMFS_COMPILE="${IVSHMEMFS_COMPILE:-1}"
"$ROOT/.venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile \
    --target "$WORK/packages" "$WORK/source"
"$ROOT/.venv/bin/python" "$ROOT/packaging/bundle/tree.py" "$WORK/packages" "$TREE"
sed -n 's/^__version__ = "\(.*\)"/\1/p' "$ROOT/ivshmemfs/__init__.py" >"$TREE/VERSION"
