#!/bin/sh
# Jobs between machines: files that one machine leaves and exactly one other takes.
#
#   sh jobs.sh send DIRECTORY FILE...          on any machine
#   sh jobs.sh work DIRECTORY COMMAND [ARG...] on each machine that works; runs until DIRECTORY/stop exists
#
# DIRECTORY is the same directory of the region on all machines.  COMMAND gets the path of a job as
# its last argument; what it prints becomes DIRECTORY/done/NAME.  A job whose COMMAND fails goes to
# DIRECTORY/failed.
#
# It needs no locks.  A file gets its place by mv only when it is whole, and of all machines that
# try to move a job to themselves exactly one succeeds.  If a worker dies, its job remains in
# DIRECTORY/taken/HOST.PID.
set -eu

say() { printf 'jobs: %s\n' "$*" >&2; }

if [ $# -lt 3 ]; then
    sed -n '4,5s/^# \{0,1\}//p' "$0" >&2
    exit 1
fi
what=$1 top=$2
shift 2
mkdir -p "$top/new" "$top/jobs" "$top/done" "$top/failed" "$top/taken"

case $what in
send)
    for file in "$@"; do
        name=${file##*/}
        cp -- "$file" "$top/new/$name.$$" # others do not look here
        mv -- "$top/new/$name.$$" "$top/jobs/$name"
    done
    ;;
work)
    mine=$top/taken/$(uname -n).$$
    mkdir "$mine"
    while [ ! -e "$top/stop" ]; do
        idle=yes
        for job in "$top/jobs"/*; do
            name=${job##*/}
            mv -- "$job" "$mine/$name" 2>/dev/null || continue # another machine was faster
            idle=
            if "$@" "$mine/$name" >"$mine/$name.out"; then
                mv -- "$mine/$name.out" "$top/done/$name"
                rm -- "$mine/$name"
            else
                say "$name failed"
                mv -- "$mine/$name" "$top/failed/$name"
                rm -f -- "$mine/$name.out"
            fi
        done
        # Wakes up some 2 ms after another machine has left a job; looks every 5 s in any case.
        [ -z "$idle" ] || ivshmemfs wait --changed --timeout 5 "$top/jobs" || [ $? -eq 124 ]
    done
    rmdir "$mine"
    ;;
*)
    say "unknown: $what"
    exit 1
    ;;
esac
