"""The command `ivshmemfs`: arguments, printing and exit codes, nothing else.

`main` finds the subcommand; `mount`, `looking`, `dump` and `peers` are the subcommands.
"""
